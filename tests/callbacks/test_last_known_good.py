"""`LastKnownGood`: what is written, what is refused, and what a resume makes of it."""

import copy
import logging
import sys
import threading
import time
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_stability import AutoRollback, GradientMonitor, LastKnownGood, find_last_good
from lit_stability.callbacks.last_known_good.resume_check import RestoredStateDiffers
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from lit_stability.training_state import async_writer as writer
from lit_stability.training_state.good_checkpoints import RunEnd, good_files, step_of
from tests.callbacks.test_battery import TwoOptimizers
from tests.conftest import Regression, fit, flat, make_trainer, regression_data
from tests.delayed import Unordered, delay_copies


def suite(*extra, **options):
    options = {"every_n_steps": 10, "confirm_after": 3} | options
    return [*extra, GradientMonitor(), LastKnownGood(**options), AutoRollback()]


def steps(root):
    return [step_of(f) for f in good_files(root / "good")]


def resume(root, callbacks, module=None, data=None, **options):
    """Go on from the last known good checkpoint of a folder."""
    trainer = make_trainer(root, callbacks, **options)
    module = Regression() if module is None else module
    data = regression_data() if data is None else data
    trainer.fit(module, data, ckpt_path=find_last_good(root))
    return module, trainer


class Join(Callback):
    """Waits for the writer, so that a short fit has its files at known steps."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        for thread in threading.enumerate():
            if thread.name == "last known good":
                thread.join()


class Crash(Callback):
    """Ends the fit with an exception."""

    def __init__(self, step, kind=RuntimeError):
        self.step, self.kind = step, kind

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            raise self.kind("failed on purpose")


class Rates(Callback):
    """Factors on the learning rate, step by step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        for callback in trainer.callbacks:
            if isinstance(callback, AutoRollback):
                self.seen.append(callback.backoff.lr_factor)


def test_first_copy_is_of_step_0_and_the_newest_two_stay(tmp_path):
    """S11: model, optimizer, scheduler, generators, metrics; the last n."""
    fit(tmp_path / "short", [*suite(), Join()], max_steps=8)
    assert steps(tmp_path / "short") == [0]
    fit(tmp_path, [*suite(), Join()], lambda: Regression(scheduler="onecycle"), max_steps=48)
    assert steps(tmp_path) == [30, 40]
    state = torch.load(find_last_good(tmp_path), weights_only=True)
    assert state["global_step"] == 40
    assert state.keys() >= {"state_dict", "optimizer_states", "lr_schedulers", "loops"}
    own = state["callbacks"]["LastKnownGood"]
    assert own["position"]["now"].keys() == {"python", "numpy", "torch", "accelerator"}
    assert own["kept"]["step"] == 40


def test_copy_is_of_the_step_it_names_however_slow_the_disk_is(tmp_path, monkeypatch):
    """The copy does not change while it is written, and training does not wait for it."""
    seen = {}

    class StepRecorder(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen[trainer.global_step] = torch.cat(
                [p.detach().flatten() for p in pl_module.parameters()]
            )

    saved = torch.save

    def slow(state, file):
        time.sleep(0.5)
        saved(state, file)

    monkeypatch.setattr(writer.torch, "save", slow)
    started = time.perf_counter()
    _, trainer = fit(tmp_path, [*suite(every_n_steps=1, keep=99), StepRecorder()], max_steps=60)
    files = good_files(tmp_path / "good")
    assert 1 <= len(files) <= 1 + (time.perf_counter() - started) / 0.5
    for file in files:
        weights = torch.load(file, weights_only=True)["state_dict"]
        names = [n for n, _ in trainer.lightning_module.named_parameters()]
        assert torch.equal(torch.cat([weights[n].flatten() for n in names]), seen[step_of(file)])


class States(Callback):
    """Weights, buffers and moments before each step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, *args):
        moments = trainer.optimizers[0].state_dict()["state"]
        self.seen[trainer.global_step] = copy.deepcopy((pl_module.state_dict(), moments))

    def differ(self, file):
        """What of a file is not as it was at the step in its name."""
        state = torch.load(file, weights_only=True)
        weights, moments = self.seen[step_of(file)]
        now = state["state_dict"]
        found = [n for n, v in weights.items() if not torch.equal(now[n], v.cpu())]
        saved = state["optimizer_states"][0]["state"]
        assert saved.keys() == moments.keys()
        pairs = [(saved[i][k], v) for i, each in moments.items() for k, v in each.items()]
        return found + ["moments"] * any(not torch.equal(a, b.cpu()) for a, b in pairs)


class WritesWeights(Regression):
    """Adds to a weight at the start of each batch, when a copy of it may be under way."""

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            self.net[0].weight.add_(1e-3)


class WritesMoments(Regression):
    """Lowers the moments at the start of each batch."""

    def on_train_batch_start(self, batch, batch_idx):
        for state in self.trainer.optimizers[0].state.values():
            state["exp_avg"].mul_(0.9)


class WritesData(Regression):
    """Adds to a weight in each forward pass, by way of ``data``: no version counter shows it."""

    def training_step(self, batch, batch_idx):
        self.net[0].weight.data.add_(1e-3)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("module", "first"),
    [(Regression, 0), (WritesWeights, 1), (WritesMoments, 0), (WritesData, 0)],
)
def test_copy_made_beside_training_is_of_one_moment(module, first, tmp_path, monkeypatch):
    """The first copy of a weight that the program wrote meanwhile is discarded."""
    delay_copies(monkeypatch, shortest=0.02, longest=0.04)
    states = States()
    callbacks = [*suite(every_n_steps=1, confirm_after=1, keep=99), states, Join()]
    fit(tmp_path, callbacks, module, max_steps=20)
    files = good_files(tmp_path / "good")
    assert len(files) > 5
    assert step_of(files[0]) == first
    assert {file.name: states.differ(file) for file in files} == {f.name: [] for f in files}


def test_copy_that_no_step_waits_for_is_torn(tmp_path, monkeypatch):
    """What the wait before a step is for."""
    delay_copies(monkeypatch, Unordered, shortest=0.3, longest=0.3)
    states = States()
    fit(tmp_path, [*suite(confirm_after=3), states, Join()], max_steps=16)
    assert any(states.differ(file) for file in good_files(tmp_path / "good"))


def test_incident_discards_the_copy_that_is_not_confirmed(tmp_path):
    """Nothing that an incident followed within `confirm_after` steps is called good."""
    callbacks = [*suite(FaultInjector([NanLoss(step=11), NanLoss(step=22)]), keep=9), Join()]
    fit(tmp_path, callbacks, max_steps=40)
    assert steps(tmp_path) == [0, 12, 23, 33]


def test_damage_that_no_detector_sees_is_refused(tmp_path, caplog):
    """Invariant 2: no non-finite weight reaches a checkpoint called good."""
    fault = CorruptWeight(step=15, parameter="net.4.bias")
    callbacks = [FaultInjector([fault]), GradientMonitor(detectors=[]), *suite()[1:2], Join()]
    fit(tmp_path, callbacks, max_steps=60)
    assert steps(tmp_path) == [0, 10]
    assert "no good checkpoint written at step 20: net.0.weight is non-finite" in caplog.text


def test_rollback_discards_the_copy_and_counts_from_there(tmp_path):
    callbacks = suite(FaultInjector([CorruptWeight(step=31, parameter="net.0.weight")]), keep=9)
    _, trainer = fit(tmp_path, [*callbacks, Join()], max_steps=60)
    assert trainer.global_step == 60
    for file in good_files(tmp_path / "good"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.isfinite(v).all() for v in state.values())
    assert steps(tmp_path)[-1] >= 40


def test_constant_of_infinities_is_not_taken_for_damage(tmp_path):
    class Masked(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    stopping = EarlyStopping("train/loss_epoch", patience=100, check_on_train_epoch_end=True)
    fit(tmp_path, [*suite(), stopping, Join()], Masked, max_steps=20)
    assert steps(tmp_path) == [0, 10]


def test_disk_that_fails_is_reported_once_and_training_continues(tmp_path, caplog):
    (tmp_path / "good").write_text("in the way")
    _, trainer = fit(tmp_path, [*suite(), Join()], max_steps=60)
    assert trainer.global_step == 60
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert "cannot be written" in warnings[0].getMessage()
    assert "was not written" in warnings[1].getMessage()


def test_hook_that_fails_is_reported_once_and_training_continues(tmp_path, caplog):
    class Fails(Regression):
        def on_save_checkpoint(self, checkpoint):
            raise ValueError("not now")

    _, trainer = fit(tmp_path, [*suite(), Join()], Fails, max_steps=60)
    assert trainer.global_step == 60
    assert caplog.text.count("no good checkpoint can be taken: ValueError('not now')") == 1


def test_run_that_failed_goes_on_with_care_and_one_that_was_interrupted_does_not(tmp_path, caplog):
    """S12: learning rate and clip x0.5 after a crash, more with each further failure in a row."""
    with pytest.raises(RuntimeError, match="failed on purpose"):
        fit(tmp_path, [*suite(), Crash(28), Join()])
    end = RunEnd.read(tmp_path / "good")
    assert (end.state, end.step, end.failures) == ("failed", 28, 1)
    assert end.reason == "RuntimeError: failed on purpose"
    for factor, again in ((0.5, "failed:"), (0.25, "failed 2 times in a row:")):
        rates = Rates()
        with pytest.raises(RuntimeError, match="failed on purpose"):
            resume(tmp_path, [*suite(), rates, Crash(25), Join()])
        assert rates.seen == [factor] * 5
        assert f"{again} learning rate and clip x{factor}" in caplog.text
    rates = Rates()
    with pytest.raises(SystemExit):
        resume(
            tmp_path, [*suite(lr_factor_after_crash=1), rates, Crash(45, KeyboardInterrupt), Join()]
        )
    assert set(rates.seen) == {1.0}
    assert steps(tmp_path)[-1] == 40
    rates = Rates()
    _, trainer = resume(tmp_path, [*suite(), rates])
    assert set(rates.seen) == {1.0}, "an interruption is no failure"
    assert trainer.global_step == 60
    assert RunEnd.read(tmp_path / "good").state == "finished"


def test_care_is_relaxed_within_tens_of_steps(tmp_path):
    with pytest.raises(RuntimeError, match="failed on purpose"):
        fit(tmp_path, [*suite(), Crash(28), Join()])
    rates = Rates()
    resume(tmp_path, [*suite(), rates])
    assert rates.seen == [0.5] * 19 + [1.0] * 21


def test_care_without_a_rollback_says_that_nothing_is_lowered(tmp_path, caplog):
    pair = lambda: suite()[:2]  # noqa: E731
    with pytest.raises(RuntimeError, match="failed on purpose"):
        fit(tmp_path, [*pair(), Crash(28), Join()])
    resume(tmp_path, pair())
    assert "are unchanged: only an AutoRollback can lower them" in caplog.text


def test_failure_is_remembered_when_each_run_has_a_folder_of_its_own(tmp_path):
    """A logger's versions: the next resume finds the same file, and the count of failures."""
    rates = Rates()
    for _ in range(3):
        logger = CSVLogger(tmp_path)
        with pytest.raises(RuntimeError, match="failed on purpose"):
            resume(tmp_path, [*suite(), rates, Crash(18), Join()], logger=logger)
    assert rates.seen == [1.0] * 18 + [0.5] * 8 + [0.25] * 8


def tamper(root, change):
    """Change the newest file on disk."""
    file = find_last_good(root)
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def test_restored_state_with_another_loss_ends_the_fit_before_its_first_step(tmp_path, caplog):
    """S12, S17: the error names both losses."""
    fit(tmp_path, [*suite(), Join()], max_steps=30)
    tamper(tmp_path, lambda state: state["state_dict"]["net.4.bias"].add_(0.1))
    kept = torch.load(find_last_good(tmp_path), weights_only=True)["callbacks"]["LastKnownGood"]
    loss = float(kept["kept"]["loss"])
    before = RunEnd.read(tmp_path / "good")
    module = Regression()
    with pytest.raises(RestoredStateDiffers, match=rf"is 0\.\d+, it was {loss:.9g} at step 20"):
        resume(tmp_path, suite(), module)
    assert module.losses == [], "no step was taken, and the comparison left no trace"
    assert RunEnd.read(tmp_path / "good") == before, "it is no failure of the run"
    _, trainer = resume(tmp_path, suite(on_mismatch="warn"))
    assert trainer.global_step == 60
    assert "on_mismatch='warn'" in caplog.text


class Pair(NamedTuple):
    """A batch by name."""

    x: torch.Tensor
    y: torch.Tensor


class Named(Regression):
    """Takes its batch by name."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


def pairs(items, kind=Pair):
    return kind(*(torch.stack(column) for column in zip(*items, strict=True)))


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_batch_that_is_a_named_tuple_is_kept_and_compared(tmp_path, caplog, monkeypatch):
    data = DataLoader(regression_data().dataset, 16, collate_fn=pairs)
    fit(tmp_path, [*suite(), Join()], Named, data, max_steps=30)
    assert "cannot verify" not in caplog.text
    caplog.set_level(logging.INFO)
    resume(tmp_path, suite(), Named(), data)
    assert "the data continue with the next batch" in caplog.text
    monkeypatch.delattr(sys.modules[__name__], "Pair")
    _, trainer = resume(tmp_path, suite(), Named(), data, max_steps=62)
    assert trainer.global_step == 62
    assert f"not verified: the batch was a Pair, which {__name__} no longer defines" in caplog.text


def test_data_that_changed_are_reported(tmp_path, caplog):
    """S12: the state is the saved one; the batch that comes is another."""
    fit(tmp_path, [*suite(), Join()], max_steps=30)
    resume(tmp_path, suite(), data=regression_data(seed=7))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "but the next batch differs" in warning


def test_data_that_got_shorter_end_the_fit_with_both_numbers(tmp_path):
    fit(tmp_path, [*suite(), Join()], max_steps=30)
    with pytest.raises(
        RuntimeError, match="end after 5 batches, but the checkpoint was saved after 20"
    ):
        resume(tmp_path, suite(), data=regression_data(5))


def test_precision_that_changed_leaves_the_state_unverified(tmp_path, caplog):
    fit(tmp_path, [*suite(), Join()], max_steps=30)
    _, trainer = resume(tmp_path, suite(), precision="bf16-mixed")
    assert trainer.global_step == 60
    assert "was not verified: precision was 32-true, is bf16-mixed" in caplog.text


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_kept_batch_is_bounded_and_plain(tmp_path, caplog):
    fit(tmp_path / "a", [*suite(max_batch_bytes=100), Join()], max_steps=30)
    assert caplog.text.count("the batch takes 576 bytes, more than 100") == 1

    class Odd(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    def collate(items):
        x, y = zip(*items, strict=True)
        return torch.stack(x), torch.stack(y), {"a", "set"}

    data = DataLoader(regression_data().dataset, 16, collate_fn=collate)
    fit(tmp_path / "b", [*suite(), Join()], Odd, data, max_steps=30)
    assert caplog.text.count("the batch contains a set, which a checkpoint cannot store") == 1
    for root in (tmp_path / "a", tmp_path / "b"):
        state = torch.load(find_last_good(root), weights_only=True)
        assert "kept" not in state["callbacks"]["LastKnownGood"]


def test_manual_optimization_goes_on_exactly_but_unverified(tmp_path, caplog):
    whole, _ = fit(tmp_path, [*suite(every_n_steps=20), Join()], TwoOptimizers, max_steps=60)
    assert caplog.text.count("a training_step cannot be run without its update") == 1
    assert steps(tmp_path) == [20, 40]
    resumed, trainer = resume(tmp_path, suite(), TwoOptimizers(), max_steps=60)
    assert trainer.global_step == 60
    assert torch.equal(flat(whole), flat(resumed))


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_module_that_reads_ahead_on_its_own_cannot_be_positioned_and_is_reported(tmp_path, caplog):
    class Reader(Regression):
        def training_step(self, dataloader_iter):
            (x, y), _, _ = next(dataloader_iter)
            return (self.net(x).squeeze(-1) - y).square().mean()

    fit(tmp_path, [*suite(), Join()], Reader, max_steps=30)
    assert caplog.text.count("training_step takes `dataloader_iter`") == 1
    lines = [r for r in caplog.records if "will not verify the restored" in r.getMessage()]
    assert [r.levelname for r in lines] == ["INFO"], "nothing is wrong with the run"
    _, trainer = resume(tmp_path, suite(), Reader())
    assert trainer.global_step == 60


def test_new_run_in_the_folder_of_an_old_one_leaves_its_files_alone(tmp_path):
    """Invariant 10: the next resume must not take the old run's later step for the newest."""
    fit(tmp_path, [*suite(), Join()], max_steps=50)
    assert steps(tmp_path) == [30, 40]
    fit(tmp_path, [*suite(), Join()], max_steps=20)
    assert steps(tmp_path) == [0, 10]
    assert [step_of(f) for f in good_files(tmp_path / "good.1")] == [30, 40]


def test_run_resumed_twice_from_one_file_loses_neither_branch(tmp_path):
    """Invariant 10: files of later steps than the one just written are not pruned."""
    fit(tmp_path, [*suite(), Join()], max_steps=35)
    first = find_last_good(tmp_path)
    assert step_of(first) == 30
    resume(tmp_path, [*suite(), Join()], max_steps=58)
    oldest = good_files(tmp_path / "good")[0]
    assert steps(tmp_path) == [40, 50]
    again = make_trainer(tmp_path, [*suite(every_n_steps=3), Join()], max_steps=48)
    again.fit(Regression(), regression_data(), ckpt_path=oldest)
    assert steps(tmp_path) == [40, 43, 50]


def test_files_left_half_written_are_removed(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good/.part-step=00000010.ckpt").write_text("half")
    fit(tmp_path, suite(), max_steps=8)
    assert not list(tmp_path.rglob(".part-*"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"confirm_after": 0}, "confirm_after must be at least 1, got 0"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"max_batch_bytes": -1}, "max_batch_bytes must be at least 0, got -1"),
        ({"on_mismatch": "stop"}, "on_mismatch must be 'raise' or 'warn', got 'stop'"),
        ({"lr_factor_after_crash": 0.0}, "lr_factor_after_crash must be in"),
    ],
)
def test_option_out_of_its_range_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        LastKnownGood(**option)
