"""Models that raise where they see a NaN, or a batch that they cannot work with."""

import copy
import functools
import math
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributions import Categorical, Normal

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    TrainingStopped,
    read_incidents,
    stability_callbacks,
)
from lit_stability.faults import CorruptWeight, FaultInjector
from tests.conftest import Regression, every_other, fit
from tests.exact import Batches, differences, loader, run
from tests.test_exact_recovery import Net, TwoOptimizers, in_dict, onecycle, plateau, sequence
from tests.test_invariants import fp16_on_cpu

BATCHES, BAD = 16, 10
"""Number in an epoch, and index of the batch that raises."""


def normal(out):
    Normal(out, 1.0, validate_args=True)


def categorical(out):
    Categorical(logits=out.expand(2, -1), validate_args=True)


def cross_entropy_range(out):
    nn.functional.binary_cross_entropy(out.sigmoid(), torch.zeros_like(out))


def cholesky(out):
    torch.linalg.cholesky(out.outer(out) + torch.eye(len(out)))


def eigenvalues(out):
    torch.linalg.eigvalsh(out.outer(out))


def index(out):
    nn.functional.embedding((out.isnan() * 9).long(), torch.zeros(2, 2))


def look_up(out):
    {False: "finite"}[bool(out.isnan().any())]


def assertion(out):
    assert torch.isfinite(out).all(), "NaN in the output"


def plain_exception(out):
    if out.isnan().any():
        raise Exception("Loss is NaN, training stopped.")


def as_integer(out):
    int(out.sum())


def too_large(out):
    int(math.inf if out.isnan().any() else 0)


def division(out):
    1 / int(out.isfinite().all())


def numpy_svd(out):
    np.linalg.svd(out.detach().numpy()[None])


RAISES = [normal, categorical, cross_entropy_range, cholesky, eigenvalues, index, look_up]
RAISES += [assertion, plain_exception, as_integer, too_large, division, numpy_svd]


def raising(module, check):
    """The class of a module whose forward pass raises what `check` raises on its output."""

    class Raising(module):
        def forward(self, x):
            out = super().forward(x)
            check(out.detach().float())
            return out

    return Raising


def pair(tmp_path, module, *, suite=None, nan=(BAD,), make=None, callbacks=None, **options):
    """Trains with the bad batches and the suite, and without either; returns the differences."""
    make = make or (lambda **o: loader(Batches(**o)))
    options = {"max_epochs": 2, "max_steps": -1, **options}
    results = []
    for name in ("bad", "clean"):
        others = [] if callbacks is None else callbacks(tmp_path / name)
        used = [GradientMonitor(), AutoRollback()] if suite is None else suite()
        data = make(count=BATCHES, **({"nan": nan} if name == "bad" else {"left_out": nan}))
        own = {k: v() if callable(v) else v for k, v in options.items()}
        root, used = tmp_path / name, [*(used if name == "bad" else []), *others]
        results.append(run(root, module, data, used, val=loader(Batches(4)), **own))
    return differences(*results)


@pytest.mark.parametrize("check", every_other(RAISES), ids=lambda c: c.__name__)
def test_batch_on_which_the_model_raises_is_left_out_exactly(check, tmp_path):
    assert pair(tmp_path, raising(Net, check), suite=stability_callbacks) == {}
    incidents = read_incidents(tmp_path / "bad")
    assert {i["kind"] for i in incidents} == {"exception"}
    assert {i["cause"] for i in incidents} == {"bad batch"}
    assert {tuple(i["responses"]) for i in incidents} == {("step retried", "step skipped")}
    assert "batch[0] holds 64 nan, in all 8 samples" in incidents[0]["message"]


class EvaluatesWithin(Net):
    """Changes its mode, and which parameters it trains, while it computes the loss."""

    def forward(self, x):
        self.last.eval()
        self.first.requires_grad_(False)
        super().forward(x)
        self.last.train()
        self.first.requires_grad_(True)
        return super().forward(x)


class RaisesBetweenSteps(Net):
    """Manual optimization; raises after the first of two optimizers has stepped."""

    def __init__(self, check):
        super().__init__()
        self.automatic_optimization = False
        self.check = check

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = super().training_step([batch[0].nan_to_num(), batch[1]], batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            if index == 1:
                self.check(batch[0][:, 0])
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers().step()

    configure_optimizers = TwoOptimizers.configure_optimizers


class EverySecondBatch(Net):
    """Manual optimization that accumulates the gradients of two batches."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen = 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.seen += 1
        if self.seen % 2 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def rewindable_state(self):
        return {"seen": self.seen}

    def load_rewindable_state(self, state):
        self.seen = state["seen"]


class Lbfgs(Net):
    def __init__(self, raise_at=1):
        super().__init__()
        self.raise_at, self.calls = raise_at, 0
        self.last[0].p = 0.0

    def on_train_batch_start(self, batch, batch_idx):
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls < self.raise_at:
            x = x.nan_to_num()
        out = super().forward(x)
        normal(out)
        return out

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=4)


FEATURES = {
    "accumulation": {"accumulate_grad_batches": 3},
    "fp16 with a scaler": {"plugins": fp16_on_cpu},
    "bf16": {"precision": "bf16-mixed"},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "OneCycle": {"module": functools.partial(raising(Net, normal), scheduler=onecycle)},
    "plateau by epoch": {
        "module": functools.partial(
            raising(Net, normal), scheduler=plateau("val/loss", "epoch")
        )
    },
    "fused": {"module": functools.partial(raising(Net, normal), "fused AdamW")},
    "validation in mid-epoch": {"val_check_interval": 5},
    "shuffled": {"make": lambda **o: sequence(Batches(**o))},
    "workers": {"make": lambda **o: loader(Batches(**o), num_workers=1)},
    "CombinedLoader": {"make": in_dict},
    "EMA": {"callbacks": lambda root: [EMAWeightAveraging(decay=0.9)]},
    "ModelCheckpoint": {
        "enable_checkpointing": True,
        "callbacks": lambda root: [
            ModelCheckpoint(root / "often", every_n_train_steps=4, save_top_k=3, monitor="step",
                            mode="max", filename="{step}")
        ],
    },
    "modes changed within the step": {"module": raising(EvaluatesWithin, normal)},
    "gradient checkpointing": {
        "module": functools.partial(raising(Net, normal), recompute=True)
    },
    "two optimizers": {"module": raising(TwoOptimizers, normal)},
    "between two optimizers": {"module": functools.partial(RaisesBetweenSteps, normal)},
    "by hand, every second batch": {"module": raising(EverySecondBatch, normal)},
    "LBFGS": {"module": Lbfgs},
    "LBFGS, third evaluation": {"module": functools.partial(Lbfgs, 3)},
    "last batch": {"nan": (15,)},
    "first batch of the second epoch": {"make": lambda **o: sequence(Batches(**o)), "nan": (2,)},
    "two adjacent batches": {"nan": (10, 11)},
    "three adjacent batches": {"nan": (10, 11, 12)},
    "two of one window": {"nan": (9, 10), "accumulate_grad_batches": 4},
    "last of a window": {"nan": (11,), "accumulate_grad_batches": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", every_other(FEATURES))
def test_batch_that_raises_is_left_out_exactly_with_every_feature(name, tmp_path):
    options = {"module": raising(Net, normal), **FEATURES[name]}
    assert pair(tmp_path, **options) == {}


class OwnBackward(Net):
    """Trains layer by layer inside ``training_step``; its loss has no graph from step 5 on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step < 5:
            return loss
        loss.backward()
        return loss.detach()

    def backward(self, loss):
        if loss.requires_grad:
            loss.backward()


class NothingAtTimes(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 5 == 3 else loss


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    "module", [Net, OwnBackward, NothingAtTimes, TwoOptimizers, EvaluatesWithin, EverySecondBatch]
)
def test_healthy_run_is_unchanged_by_the_guard(module, tmp_path):
    assert pair(tmp_path, module, nan=()) == {}
    assert not [*tmp_path.rglob("incidents.jsonl")]


class Raise(Net):
    """Raises what `make` returns, from a global step on, or at the batches named."""

    def __init__(self, make=None, step=10, batches=None):
        super().__init__()
        self.make, self.step, self.batches = make, step, batches
        self.raised = []

    def training_step(self, batch, batch_idx):
        due = self.trainer.global_step >= self.step and self.batches is None
        if due or float(batch[1][0]) in (self.batches or ()):
            self.raised.append(self.make())
            raise self.raised[-1]
        return super().training_step(batch, batch_idx)


class EndOfEpisode(RuntimeError):
    """A class of the program: it may mean anything."""


THROUGH = {
    "wrong type": lambda: TypeError("unsupported operand"),
    "missing attribute": lambda: AttributeError("'Net' object has no attribute 'x'"),
    "missing name": lambda: NameError("name 'x' is not defined"),
    "not implemented": lambda: NotImplementedError(),
    "class of the program": lambda: EndOfEpisode("nan"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"),
    "configuration": lambda: MisconfigurationException("nan"),
    "memory of the device": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "memory of the host": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "memory of python": lambda: MemoryError(),
    "lost device": lambda: RuntimeError("CUDA error: device-side assert triggered"),
    "lost rank": lambda: RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"),
    "lost worker": lambda: RuntimeError("DataLoader worker (pid 7) is killed by signal"),
    "exit": lambda: SystemExit(3),
}


@pytest.mark.parametrize("make", THROUGH.values(), ids=[t.replace(" ", "-") for t in THROUGH])
def test_exception_that_numbers_cannot_cause_ends_the_fit_at_once(make, tmp_path):
    module = Raise(make)
    with pytest.raises(type(make())) as caught:
        fit(tmp_path, stability_callbacks(), lambda: module, loader(Batches()))
    assert caught.value is module.raised[0]
    assert len(module.raised) == 1
    assert not [*tmp_path.rglob("incidents.jsonl")]


def test_stop_of_another_callback_is_not_caught(tmp_path):
    class Stops(Raise):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 10:
                raise TrainingStopped("stop", None)
            return super().training_step(batch, batch_idx)

    with pytest.raises(TrainingStopped, match=r"^stop$"):
        fit(tmp_path, stability_callbacks(), lambda: Stops(step=99), loader(Batches()))


def test_exception_before_the_first_good_step_is_raised_at_once(tmp_path):
    module = Raise(lambda: ValueError("shapes do not match"), step=0)
    with pytest.raises(ValueError, match="shapes") as caught:
        fit(tmp_path, stability_callbacks(), lambda: module, loader(Batches()))
    assert caught.value is module.raised[0]
    assert len(module.raised) == 1


def test_program_that_raises_on_every_batch_ends_with_its_own_exception(tmp_path, caplog):
    module = Raise(lambda: ValueError("wrong from here on"))
    with pytest.raises(ValueError, match="wrong from here on") as caught:
        fit(tmp_path, stability_callbacks(), lambda: module, loader(Batches()))
    assert caught.value is module.raised[-1], "of the third batch; the first two were retried"
    assert len(module.raised) == 5
    assert caught.traceback[-1].name == "training_step"
    assert caught.traceback[-1].path.name == "test_raising_models.py"
    assert "raises on 3 batches in a row; batch, weights and buffers are finite" in caplog.text


def test_exception_without_a_suite_that_acts_is_that_of_the_bare_run(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append("training_step" in vars(trainer.strategy))

    module = Raise(lambda: ValueError("nan"))
    with pytest.raises(ValueError, match="nan"):
        fit(tmp_path, [GradientMonitor(), Look()], lambda: module, loader(Batches()))
    assert not any(seen)
    assert len(module.raised) == 1


def labels(*indices):
    """First labels of batches, by which `Raise` knows them."""
    return [float(Batches().y[i][0]) for i in indices]


@pytest.mark.parametrize("bad", [(4,), (4, 5), (4, 5, 7, 8, 10)])
def test_finite_batch_on_which_the_model_raises_is_left_out_exactly(bad, tmp_path):
    module = functools.partial(Raise, lambda: IndexError("Target 7 is out of bounds."))
    raising_run = functools.partial(module, batches=labels(*bad))
    results = [
        run(tmp_path / "bad", raising_run, loader(Batches()), stability_callbacks(), max_epochs=2),
        run(tmp_path / "clean", Net, loader(Batches(left_out=bad)), max_epochs=2),
    ]
    assert differences(*results) == {}
    incidents = read_incidents(tmp_path / "bad")
    assert {i["cause"] for i in incidents} == {"the model raises on this batch"}
    assert {i["verdict"] for i in incidents} == {"deterministic"}
    assert {i["outcome"] for i in incidents} == {"recurring"}
    assert re.search(r"Target 7 .* at test_raising_models.py:\d+ in tr", incidents[0]["message"])


def test_rows_of_bad_batches_among_many_bad_ones_do_not_end_the_fit(tmp_path):
    bad = range(1, 24, 3)
    module = functools.partial(Raise, lambda: ValueError("bad label"), batches=labels(*bad))
    data = sequence(Batches())
    _, trainer = fit(tmp_path, stability_callbacks(), module, data, max_epochs=6, max_steps=-1)
    assert trainer.global_step == 6 * (24 - len(bad))


def test_batches_that_raise_are_dropped_where_data_are_not_replayed(tmp_path):
    module = functools.partial(Raise, lambda: ValueError("bad label"), batches=labels(4, 9))
    suite = [GradientMonitor(), AutoRollback(after_rollback="skip")]
    fitted, trainer = fit(tmp_path, suite, module, loader(Batches()), max_epochs=1, max_steps=-1)
    assert trainer.global_step == 22
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"] == ["step skipped", "step skipped"]
    clean, _ = fit(tmp_path, [], Net, loader(Batches(left_out=(4, 9))), max_epochs=1, max_steps=-1)
    assert torch.equal(fitted.first[0].weight, clean.first[0].weight)


def test_step_that_raises_by_its_own_random_draw_is_retried_with_another(tmp_path):
    class Draws(Net):
        bad = None

        def training_step(self, batch, batch_idx):
            draw = float(torch.rand(()))
            if self.trainer.global_step == 12:
                self.bad = draw if self.bad is None else self.bad
                if draw == self.bad:
                    raise ValueError("rejection sampling failed")
            return super().training_step(batch, batch_idx)

    _, trainer = fit(tmp_path, stability_callbacks(), Draws, loader(Batches()), max_epochs=3)
    assert trainer.global_step == 60
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"][-1] == "step retried with new random numbers"
    assert incident["outcome"] == "recovered"


class ConstantOnNan(Net):
    """Returns what some packages return for a NaN loss: a constant without a graph."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.isfinite() else torch.tensor(1e9)


class NoneOnNan(ConstantOnNan):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.requires_grad else None


class GradientlessOnNan(ConstantOnNan):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.requires_grad else loss.requires_grad_()


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    "module",
    [
        *(raising(Net, normal), raising(Net, plain_exception), raising(TwoOptimizers, normal)),
        *(ConstantOnNan, NoneOnNan, GradientlessOnNan),
    ],
)
def test_damaged_weight_in_a_model_that_raises_is_rolled_back_exactly(module, tmp_path):
    fault = CorruptWeight(step=30, parameter="first.0.weight")
    suite = [FaultInjector([fault]), *stability_callbacks()]
    results = [
        run(tmp_path / "bad", module, loader(Batches()), suite, max_epochs=2),
        run(tmp_path / "clean", module, loader(Batches()), max_epochs=2),
    ]
    assert differences(*results) == {}
    (incident,) = read_incidents(tmp_path / "bad")
    assert incident["kind"] == "non-finite weight"
    assert "first.0.weight" in incident["message"]
    assert incident["cause"] == "weights damaged from outside"
    assert incident["responses"] == ["rolled back and replayed"]


@pytest.mark.parametrize("module", [ConstantOnNan])
def test_bad_batch_for_which_the_loss_is_a_constant_is_left_out_exactly(module, tmp_path):
    assert pair(tmp_path, module, suite=stability_callbacks) == {}
    incidents = read_incidents(tmp_path / "bad")
    assert "training_step returned a loss without a graph" in incidents[0]["message"]
    assert {i["cause"] for i in incidents} == {"bad batch"}


def test_loss_without_a_graph_on_every_batch_ends_with_the_error_of_torch(tmp_path):
    class Constant(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if self.trainer.global_step < 10 else loss.detach()

    with pytest.raises(RuntimeError, match="does not require grad"):
        fit(tmp_path, stability_callbacks(), Constant, loader(Batches()))


@pytest.mark.parametrize(
    ("hook", "response", "cause"),
    [
        ("on_train_batch_end", "rolled back and replayed", "weights damaged from outside"),
        ("on_train_batch_start", "step retried", "glitch"),
    ],
)
def test_damaged_buffer_in_a_model_that_raises_is_undone_exactly(hook, response, cause, tmp_path):
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("mask", torch.full((2,), -torch.inf))

        def forward(self, x):
            out = super().forward(x) * self.scale
            normal(out)
            return out

    class Damage(Callback):
        done = False

        def damage(self, trainer, pl_module, *args):
            if trainer.global_step == 30 and not self.done:
                self.done = True
                pl_module.scale.fill_(torch.nan)

    setattr(Damage, hook, Damage.damage)
    suite = [*stability_callbacks(), Damage()]
    results = [
        run(tmp_path / "bad", Scaled, loader(Batches()), suite, max_epochs=3),
        run(tmp_path / "clean", Scaled, loader(Batches()), max_epochs=3),
    ]
    assert differences(*results) == {}
    (incident,) = read_incidents(tmp_path / "bad")
    assert ("buffer scale is non-finite" in incident["message"]) == (response != "step retried")
    assert incident["cause"] == cause
    assert incident["responses"] == [response]


class StepsWithAClosure(Net):
    """Manual optimization that computes the loss inside the step of the optimizer."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = super(StepsWithAClosure, self).training_step(batch, batch_idx)
            normal(loss)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class WritesIntoItsBatch(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        if batch[0].isnan().any():  # the first write comes too late for a copy
            batch[0].add_(1)
        normal(batch[0])
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("module", "suite"),
    [
        (StepsWithAClosure, stability_callbacks),
        (WritesIntoItsBatch, stability_callbacks),
        (
            raising(TwoOptimizers, normal),
            lambda: [GradientMonitor(), AutoRollback(after_rollback="skip")],
        ),
    ],
    ids=["inside a step", "batch written into", "data not replayed"],
)
def test_exception_in_manual_optimization_that_cannot_be_undone_is_raised(module, suite, tmp_path):
    with pytest.raises(ValueError, match="satisfy the constraint"):
        fit(tmp_path, suite(), module, loader(Batches(nan=(BAD,))))


class Copies(Callback):
    """Pickles and deep-copies the Trainer within a batch, and after each."""

    def __init__(self):
        self.copies = 0

    def on_before_zero_grad(self, trainer, *args):
        if trainer.global_step in (BAD, BAD + 5):
            self.copy(trainer)

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step in (BAD, BAD + 5):
            self.copy(trainer)

    def copy(self, trainer):
        for copied in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
            assert "_guarded" not in repr(copied.strategy.training_step)
            self.copies += 1


def test_trainer_is_copied_at_any_time_of_a_fit_in_which_a_model_raises(tmp_path):
    copies = Copies()
    suite = [*stability_callbacks(), copies]
    _, trainer = fit(tmp_path, suite, RaisesOnNan, loader(Batches(nan=(BAD,))), max_steps=20)
    assert copies.copies >= 8
    assert len(read_incidents(tmp_path)) == 1
    assert "training_step" not in vars(trainer.strategy)
    pickle.loads(pickle.dumps(trainer))


class RaisesOnNan(Regression):
    def training_step(self, batch, batch_idx):
        normal(batch[0])
        return super().training_step(batch, batch_idx)


def test_guard_is_gone_after_a_fit_and_after_an_exception(tmp_path):
    _, trainer = fit(tmp_path, stability_callbacks(), Net, loader(Batches()), max_steps=5)
    assert "training_step" not in vars(trainer.strategy)
    module = Raise(lambda: TypeError())
    strategies = []

    class Keep(Callback):
        def on_fit_start(self, trainer, pl_module):
            strategies.append(trainer.strategy)

    with pytest.raises(TypeError):
        fit(tmp_path, [*stability_callbacks(), Keep()], lambda: module, loader(Batches()))
    assert "training_step" not in vars(strategies[0])


def test_memory_of_the_failed_step_is_released(tmp_path):
    """An exception keeps the frames that it was raised through, and their tensors."""
    kept = []

    class Watched(Net):
        def forward(self, x):
            out = super().forward(x)
            if out.isnan().any():
                kept.append(weakref.ref(out))
                raise ValueError("nan")
            return out

    class Look(Callback):
        alive = -1

        def on_before_optimizer_step(self, trainer, *args):
            if kept and self.alive < 0:
                self.alive = sum(each() is not None for each in kept)

    look = Look()
    suite = [*stability_callbacks(), look]
    fit(tmp_path, suite, Watched, loader(Batches(nan=(BAD,))), max_steps=20)
    assert len(kept) == 2
    assert look.alive == 0
