"""The audit in real fits: what it finds, what it leaves as it is, and when it is silent."""

import json
import logging
import random
import sys

import pytest
import torch
from lightning.pytorch import Callback

from lit_stability import GradientMonitor, IntegrityAudit, stability_callbacks
from lit_stability.faults import CorruptGradient, CorruptOutput, CorruptWeight, FaultInjector
from lit_stability.measurement.bit_patterns import words
from tests.conftest import Regression, by_hand, fit, flat
from tests.distributed import run_ranks
from tests.exact import Batches, differences, loader, run
from tests.integrity_rank_cases import audited as audited_rank
from tests.integrity_rank_cases import both, hybrid
from tests.probe_models import Attending

KIND = "silent data corruption"


class FlipMoment(Callback):
    """Flips a bit of a moment between the update of step 10 and the next step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 11:
            state = trainer.optimizers[0].state[pl_module.net[0].weight]
            words(state["exp_avg"].data).view(-1)[7] ^= 1 << 20


class WrongUpdate(Callback):
    """Has the update of step 10 move one weight too far, as a faulty unit would; once."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 10:
            module = sys.modules["torch.optim.adam"]
            self.monkeypatch.setattr(module, "adam", self.wrong(module.adam))

    def wrong(self, update):
        def once(params, *args, **kwargs):
            self.monkeypatch.undo()
            update(params, *args, **kwargs)
            params[0].data.view(-1)[3] += 1e-4

        return once


class Opaque:
    """Something that is no attribute of the module, so that a rerun does not restore it."""

    count = 0


class Unrepeatable(Regression):
    """Its loss has a factor that a rerun does not restore, from some step on."""

    def __init__(self, since=0, **options):
        super().__init__(**options)
        self._box, self.since = [Opaque()], since

    def training_step(self, batch, batch_idx):
        box = self._box[0]
        box.count += 1
        factor = 1 + 1e-3 * (box.count % 7) if self.trainer.global_step >= self.since else 1
        return factor * super().training_step(batch, batch_idx)


class Counting(Regression):
    """A counter and a growing buffer in the loss, steps without one, writes through ``data``."""

    def __init__(self):
        super().__init__()
        self.seen, self.recent = 0, []
        self.register_buffer("queue", torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        self.recent.append(random.random())
        self.queue = torch.cat([self.queue, batch[0].mean()[None]])
        if self.seen % 7 == 0:
            return None
        factor = min(1.0, self.seen / 20) * len(self.recent) + self.queue.mean().abs()
        return factor * super().training_step(batch, batch_idx)

    def on_after_backward(self):
        for p in self.parameters():
            p.grad.data.clamp_(-0.05, 0.05)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.net[0].weight.data.clamp_(-0.3, 0.3)


def audited(root, faults=(), module=None, suite=None, **options):
    """The incidents of a run that is audited every tenth step, the audit and the module."""
    callbacks = [*(suite or [GradientMonitor()]), IntegrityAudit(every=10), *faults]
    net, _ = fit(root, callbacks, module, **{"max_steps": 25, **options})
    audit = next(c for c in callbacks if isinstance(c, IntegrityAudit))
    return callbacks[0].incidents, audit, net


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adamw", {"accumulate_grad_batches": 3}),
        ("sgd", {"precision": "bf16-mixed"}),
        ("fused", {"gradient_clip_val": 0.1}),
    ],
    ids=str,
)
def test_run_with_every_step_audited_is_bit_identical_and_exact(kind, options, tmp_path, caplog):
    """Invariant 1, with attention, batch norm, dropout, logged metrics."""
    audit = IntegrityAudit(every=1)
    make = (
        (lambda: Regression(optimizer="fused"))
        if kind == "fused"
        else (lambda: Attending(kind=kind))
    )
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        runs = [
            run(tmp_path / str(i), make, loader(Batches()), callbacks, max_epochs=1, **options)
            for i, callbacks in enumerate(([], [GradientMonitor(), audit]))
        ]
    assert differences(*runs) == {}
    assert audit.audits == 24 // options.get("accumulate_grad_batches", 1)
    assert audit.suspects() == []
    assert caplog.messages == []


WEIGHT = {"parameter": "net.0.weight"}


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (CorruptOutput(step=10, module="net.0", bit=18), "forward pass: the loss"),
        (CorruptGradient(step=10, bit=3, **WEIGHT), "the gradient of net.0.weight (bit 3)"),
        (CorruptWeight(step=10, bit=12, **WEIGHT), "bit 12 of net.0.weight flipped in memory"),
    ],
    ids=["output", "gradient", "weight"],
)
def test_flip_is_named_and_the_suite_undoes_it(fault, text, tmp_path):
    incidents, audit, net = audited(
        tmp_path / "with", [FaultInjector([fault])], suite=stability_callbacks()
    )
    (incident,) = incidents
    assert (incident.first.kind, incident.first.step, incident.cause) == (KIND, 10, KIND)
    assert incident.first.message.startswith(text)
    assert incident.verdict == "transient"
    assert [count for _, count in audit.suspects()] == [1]
    (row,) = map(json.loads, (tmp_path / "with/integrity.jsonl").read_text().splitlines())
    assert (row["step"], row["what"], row["place"]) == (
        10 - row["state"],
        "wrong",
        audit.suspects()[0][0],
    )
    bare, _ = fit(tmp_path / "bare", max_steps=25)
    assert torch.equal(flat(net), flat(bare))


def test_flip_of_a_moment_between_two_steps_is_found_in_the_next(tmp_path):
    incidents, _, _ = audited(tmp_path, [FlipMoment()])
    (found,) = [i.first for i in incidents if i.first.kind == KIND]
    assert (found.step, found.suspect, found.state_corrupted) == (11, 10, True)
    assert "bit 20 of exp_avg of net.0.weight flipped in memory after the update" in found.message


def test_wrong_update_is_found(tmp_path, monkeypatch):
    incidents, _, _ = audited(tmp_path, [WrongUpdate(monkeypatch)])
    (found,) = [i.first for i in incidents if i.first.kind == KIND]
    assert (found.step, found.suspect, found.state_corrupted) == (11, 10, True)
    assert found.message.startswith("the update of net.0.weight")


def test_fault_of_a_rerun_is_logged_and_counted_but_training_goes_on(tmp_path, caplog):
    """The injected flip waits for the second forward pass of the step."""

    class Late(CorruptOutput):
        def on_batch(self, trainer, pl_module, batch):
            def begin(*args):
                begun.remove()
                super(Late, self).on_batch(trainer, pl_module, batch)

            begun = pl_module.net[-1].register_forward_hook(begin)

    fault = Late(step=10, module="net.0", bit=18)
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        incidents, audit, _ = audited(tmp_path, [FaultInjector([fault])])
    assert incidents == []
    assert len(audit.suspects()) == 1
    assert any("training is confirmed" in line for line in caplog.messages)


@pytest.mark.parametrize("since", [0, 10])
def test_step_that_does_not_repeat_itself_is_reported_once_and_raises_no_alarm(
    since, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        incidents, audit, _ = audited(tmp_path, module=lambda: Unrepeatable(since), max_steps=60)
    assert incidents == []
    assert audit.suspects() == []
    assert len([line for line in caplog.messages if "does not repeat itself" in line]) == 1


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
def test_counters_growing_buffers_and_writes_through_data_raise_no_alarm(tmp_path, caplog):
    callbacks = [GradientMonitor(), IntegrityAudit(every=1)]
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        net, _ = fit(tmp_path / "with", callbacks, Counting, max_steps=30)
    assert (callbacks[0].incidents, callbacks[1].suspects()) == ([], [])
    assert not [line for line in caplog.messages if "IntegrityAudit" in line]
    bare, _ = fit(tmp_path / "bare", (), Counting, max_steps=30)
    assert torch.equal(flat(net), flat(bare))


class Writing(Regression):
    """Writes to its weights through ``data`` in a hook of some steps."""

    def __init__(self, hook, write):
        super().__init__(dropout=0.0)
        self.write = write
        setattr(self, hook, self._write)

    def _write(self, *args):
        if self.global_step % 7 == 6:
            self.write(self.net)


HOOKS = ("on_train_batch_end", "on_before_zero_grad", "on_after_backward")
WHOLE = {
    "halved": lambda net: [p.data.mul_(0.5) for p in net.parameters()],
    "negated": lambda net: [p.data.neg_() for p in net.parameters()],
    "clamped": lambda net: [p.data.clamp_(-0.2, 0.2) for p in net.parameters()],
}


@pytest.mark.each_value
@pytest.mark.parametrize("write", WHOLE)
@pytest.mark.parametrize("hook", HOOKS)
def test_weights_that_the_program_writes_through_data_raise_no_alarm(hook, write, tmp_path):
    """Halved or negated, all words of a tensor change by one power of two, and so may their sum."""
    callbacks = [GradientMonitor(), IntegrityAudit(every=1)]
    fit(tmp_path, callbacks, lambda: Writing(hook, WHOLE[write]), max_steps=30)
    assert [i for i in callbacks[0].incidents if i.first.kind == KIND] == []
    assert callbacks[1].suspects() == []


@pytest.mark.parametrize("hook", HOOKS)
def test_sign_that_the_program_flips_costs_one_rollback_and_changes_nothing(hook, tmp_path):
    """One element looks like damage; what comes again in the replay is the program's."""

    def module():
        return Writing(hook, lambda net: net[0].weight.data[3, 2].neg_())

    audit = IntegrityAudit(every=1)
    suite = [*stability_callbacks(), audit]
    net, _ = fit(tmp_path / "with", suite, module, max_steps=40)
    bare, _ = fit(tmp_path / "bare", (), module, max_steps=40)
    assert torch.equal(flat(net), flat(bare))
    (incident,) = suite[0].incidents
    assert sum("rolled back" in response for response in incident.responses) == 1
    assert incident.cause == "weights written by the program"
    assert audit.suspects() == []


def test_manual_optimization_is_reported_and_memory_is_still_checked(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        incidents, _, _ = audited(tmp_path, [FlipMoment()], by_hand(Regression))
    (line,) = [line for line in caplog.messages if "runs no step again" in line]
    assert "in manual optimization" in line
    assert [i.first.kind for i in incidents] == [KIND]


def test_counts_survive_a_restart_and_no_rollback_takes_them(tmp_path):
    fault = FaultInjector([CorruptWeight(step=10, bit=12, **WEIGHT)])
    _, audit, _ = audited(tmp_path, [fault], suite=stability_callbacks())
    resumed = IntegrityAudit()
    resumed.load_state_dict(audit.state_dict())
    assert resumed.suspects() == audit.suspects() != []


def test_every_below_1_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        IntegrityAudit(every=0)


@pytest.mark.parametrize(
    ("strategy", "fault", "text"),
    [
        ("ddp", "forward pass", "forward pass: the loss"),
        ("ddp", "averaged gradient", "gradient of net.0.weight differs between ranks 0, 1"),
        ("fsdp2", "weight", "bit 9 of net.0.weight flipped in memory"),
    ],
)
def test_ranks_agree_on_a_fault_of_one_of_them(strategy, fault, text, tmp_path):
    first, second = run_ranks(audited_rank, tmp_path, strategy, fault, folder=tmp_path)
    assert first == second | {"weights": first["weights"]}
    ((step, kind, message),) = first["incidents"]
    assert (step, kind) == (10, KIND)
    assert message.startswith(text)
    if "between ranks" not in text:
        assert [place.split()[1] for place, _ in first["suspects"]] == ["1"]


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [("ddp", [0, 1, 2, 5, 10]), pytest.param("fsdp2", [0, 5, 10], marks=pytest.mark.long)],
)
def test_healthy_ranks_are_bit_identical_and_raise_no_alarm(strategy, steps, tmp_path):
    for result in run_ranks(both, tmp_path, strategy, folder=tmp_path):
        assert result["weights"] == result["bare"]
        assert (result["incidents"], result["suspects"]) == ([], [])
        assert result["audits"] == 2 * len(steps)


@pytest.mark.long
def test_replicas_of_a_shard_are_compared_under_fsdp2_with_two_dimensions(tmp_path):
    for incidents in run_ranks(hybrid, tmp_path, ranks=4, folder=tmp_path):
        ((step, message),) = incidents
        assert step == 10
        assert message.startswith("net.0.weight differs between ranks 0, 2")
