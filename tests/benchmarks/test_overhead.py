"""Counting of reads and memory, and Trainers that run in turn."""

import threading
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule
from benchmarks.overhead.__main__ import TRAFFIC, compare
from benchmarks.overhead.clock import HookClock
from benchmarks.overhead.held import host_reads, tensor_bytes
from benchmarks.overhead.suites import SUITES, Suite, alternatives
from benchmarks.overhead.turns import (
    BLOCK,
    WARMUP_BLOCKS,
    RoundRobin,
    Setting,
    in_blocks,
    make_trainer,
    ratio,
    take_turns,
)
from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss

TINY = Setting(ByteGPTConfig(width=16, layers=1, heads=2, length=8), batch=2, steps=6)


def test_host_reads_are_counted_however_they_are_made():
    x = torch.arange(3.0)
    with host_reads() as reads:
        x.sum().item()
        float(x[0])
        bool(x[1] > 0)
        x.tolist()
        torch.equal(x, x + 1)
        x.numpy()
    assert reads.count == 6
    x.tolist()
    assert reads.count == 6


def test_arithmetic_on_the_device_reads_nothing():
    x = torch.arange(3.0)
    with host_reads() as reads:
        torch.cat([x, x]).square().sum() / 2
    assert reads.count == 0


def test_tensor_bytes_pass_over_tensors_without_memory():
    with FakeTensorMode():
        fake = torch.zeros(1000)
    before = tensor_bytes()
    assert fake.shape == (1000,)
    real = torch.zeros(1000)
    assert tensor_bytes() - before == real.numel() * 4


def test_tensor_bytes_count_a_storage_once():
    before = tensor_bytes()
    kept = torch.zeros(1000)
    views = [kept, kept[:10], kept.view(10, 100)]
    assert tensor_bytes() - before == 4000
    del views


def steps(blocks, *, snapshot=0.0, disturbed=()):
    """Steps of 1, with a snapshot in every block, some of them a hundred times as long."""
    found = [1.0 + snapshot * (i % BLOCK == 0) for i in range(blocks * BLOCK)]
    return [100 * t if i in disturbed else t for i, t in enumerate(found)]


def test_ratio_holds_what_every_block_has_and_not_what_disturbs_a_step():
    found = ratio(steps(10, snapshot=2.0, disturbed={91, 135}), steps(10, disturbed={164}))
    assert found.value == pytest.approx(1 + 2.0 / BLOCK)
    assert found.low <= found.value <= found.high


def test_ratio_excludes_the_warmup_blocks():
    slow = [9.0] * WARMUP_BLOCKS * BLOCK
    assert ratio(slow + steps(3), steps(WARMUP_BLOCKS + 3)).value == 1.0


def test_too_few_steps_for_a_ratio_are_rejected():
    with pytest.raises(ValueError, match=f"got {WARMUP_BLOCKS * BLOCK} steps; need more"):
        in_blocks([1.0] * WARMUP_BLOCKS * BLOCK)


class Slow(Callback):
    """Calls itself, as hooks of this package do."""

    def on_before_zero_grad(self, *args):
        self.on_healthy_step()

    def on_healthy_step(self, *args):
        pass


def test_clock_counts_a_hook_that_another_calls_once():
    now = iter(range(100))
    callback = Slow()
    clock = HookClock([callback], now=lambda: next(now))
    callback.on_before_zero_grad()
    clock.next_step()
    clock.next_step()
    assert clock.steps == [3, 0]
    assert clock.parts == {"Slow.on_before_zero_grad": 3, "Slow.on_healthy_step": 1}


def test_turns_go_round_until_all_have_left():
    turns, seen = RoundRobin(3), []

    def take(index):
        for _ in range(3 - index):
            turns.wait(index)
            seen.append(index)
            turns.pass_on(index)
        turns.wait(index)
        turns.pass_on(index, leave=True)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    turns.start()
    for thread in threads:
        thread.join(5)
    assert seen == [0, 1, 2, 0, 1, 0]


class Fails(Callback):
    """Ends its fit with an error."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            raise RuntimeError("no more")


def test_trainers_take_equal_steps_and_one_that_fails_holds_up_nobody(capsys):
    """K3: a protection that breaks is listed, and the others are measured."""
    suites = {
        "bare": SUITES["bare"],
        "fails": Suite(lambda: [Fails()]),
        "default suite": SUITES["default suite"],
    }
    times = take_turns(suites, TINY, suites)
    assert {name: len(t.steps) for name, t in times.items()} == {
        "bare": 6,
        "fails": 3,
        "default suite": 6,
    }
    assert sum(times["default suite"].hooks) > sum(times["bare"].hooks) > 0
    assert all(h < s for h, s in zip(times["bare"].hooks[1:], times["bare"].steps[1:], strict=True))
    assert "no more" in capsys.readouterr().out


def test_fit_with_an_incident_is_listed_and_not_counted_as_healthy():
    def faulty():
        return [FaultInjector([NanLoss(step=3)]), *stability_callbacks()]

    suites = {"bare": SUITES["bare"], "faulty": Suite(faulty), TRAFFIC: SUITES[TRAFFIC]}
    times = take_turns(suites, TINY, suites)
    assert {name: t.incidents for name, t in times.items()} == {"bare": 0, "faulty": 1, TRAFFIC: 0}
    rows, failed = compare(["faulty"], TINY, suites)
    assert rows == []
    assert failed == ["faulty is not a healthy run: 1 incident(s)"]


def test_traffic_alone_copies_the_state_and_leaves_a_fit_as_it_was():
    traffic = SUITES[TRAFFIC].callbacks()[0]
    modules = []
    for callbacks in ([], [traffic]):
        seed_everything(0, verbose=False)
        trainer = make_trainer(SUITES["bare"], replace(TINY, steps=20), callbacks)
        trainer.fit(module := ByteGPTModule(TINY.config), TINY.batches())
        modules.append(module)
    assert modules[0].losses == modules[1].losses
    initial, *_ = traffic._copies
    seed_everything(0, verbose=False)
    fresh = [*ByteGPTModule(TINY.config).parameters()]
    assert all(map(torch.equal, initial.saved, fresh))


def test_every_suite_can_be_made_and_has_a_baseline():
    for name, suite in SUITES.items():
        assert SUITES[suite.baseline].callbacks() == [], name
        assert all(isinstance(callback, Callback) for callback in suite.callbacks()), name


def test_protections_that_are_not_installed_are_listed_with_the_error():
    found, missing = alternatives()
    assert "SpikeDetection" in found
    assert not set(found) & set(missing)
    assert all("Error" in why for why in missing.values())
