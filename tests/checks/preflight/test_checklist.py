"""A table of broken models, each with the check that names it; the healthy ones are silent."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.byte_gpt import ByteGPT, ByteGPTConfig, loader
from lit_stability.checks.preflight import Expectations, Memorise, Subject, preflight
from tests.checks.preflight.broken import BROKEN, two_zero_layers
from tests.checks.preflight.nets import (
    CLASSES,
    Attender,
    Classifier,
    classify,
    labelled,
    padded,
    seeded,
    subject,
)


@pytest.mark.parametrize(
    ("make", "check", "severity", "where"),
    BROKEN,
    ids=[f"{b[0].__name__}-{b[1].replace(' ', '_')}" for b in BROKEN],
)
def test_preflight_of_a_broken_model_names_the_check_and_the_place(make, check, severity, where):
    """C5, N5, S4, T3, T4: see the docstrings of the models."""
    report = preflight(make())
    found = [f for f in report.findings if f.check == check and f.severity == severity]
    assert found, report.text()
    assert any(where in "".join(f.where[:1]) for f in found), report.text()


def byte_gpt(**options):
    model = seeded(ByteGPT, ByteGPTConfig(width=64, layers=2, **options))

    def step(model, batch):
        scores = model(batch[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())

    return Subject(model, step, next(iter(loader())), [torch.optim.AdamW(model.parameters(), 1e-3)])


def frozen_trunk():
    model = seeded(Classifier, dropout=0.1)
    model.trunk.requires_grad_(False).eval()
    return subject(model)


def zero_head():
    """Starting the last matrix at 0 is good practice."""
    model = seeded(Classifier)
    nn.init.zeros_(model.head.weight)
    return subject(model)


def zero_in_a_row():
    """The last moves first, the one before it next."""
    made = two_zero_layers()
    made.original.trunk[4].bias.data.fill_(1.0)
    nn.init.normal_(made.original.trunk[0].weight, std=0.2)
    return made


def default_initialisation():
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, CLASSES))
    return subject(model, step=lambda m, b: F.cross_entropy(m(b[0]), b[1]))


def noisy():
    """Noise as augmentation differs from eval mode on purpose."""

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    model = seeded(Classifier)
    model.trunk[3] = Noise()
    return subject(model)


def binary():
    model = seeded(Classifier)

    def step(model, batch):
        target = F.one_hot(batch[1], CLASSES).float()
        return F.binary_cross_entropy_with_logits(model(batch[0]), target)

    return subject(model, step=step)


HEALTHY = {
    "classifier": subject,
    "dropout": lambda: subject(seeded(Classifier, dropout=0.5)),
    "batch norm": lambda: subject(seeded(Classifier, norm=nn.BatchNorm1d)),
    "sgd": lambda: subject(optimizer=torch.optim.SGD, lr=0.1),
    "byte gpt": byte_gpt,
    "byte gpt with dropout": lambda: byte_gpt(dropout=0.2),
    "frozen trunk in eval mode": frozen_trunk,
    "head at zero": zero_head,
    "two layers at zero": zero_in_a_row,
    "default initialisation": default_initialisation,
    "noise": noisy,
    "binary": binary,
    "padded": lambda: padded(seeded(Attender, causal=False)),
}


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY)
def test_preflight_of_a_healthy_model_finds_nothing_but_notes(make):
    report = preflight(make())
    assert not report.of("error", "warning"), report.text()
    assert not [why for why in report.skipped.values() if "failed" in why]


@pytest.mark.parametrize("seed", range(5))
def test_preflight_of_a_healthy_classifier_is_silent_whatever_the_seed(seed):
    model = seeded(Classifier, seed=seed)
    assert not preflight(subject(model, labelled(16, seed))).findings


def test_preflight_leaves_model_optimizer_batch_and_generators_as_they_were():
    made = subject(seeded(Classifier, dropout=0.5, norm=nn.BatchNorm1d))
    classify(made.original, made.batch).backward()
    made.optimizers[0].step()
    state = lambda: copy.deepcopy(  # noqa: E731
        (
            {k: v.tolist() for k, v in made.original.state_dict().items()},
            [p.grad.tolist() for p in made.original.parameters()],
            [m.training for m in made.original.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.original.modules()],
            str(made.optimizers[0].state_dict()),
            [t.tolist() for t in made.batch],
            torch.get_rng_state().tolist(),
        )
    )
    before = state()
    preflight(made, Expectations(memorise=Memorise(steps=3)))
    assert state() == before


def test_preflight_of_a_model_that_cannot_be_copied_says_so_and_runs_the_rest():
    model = seeded(Classifier)
    model.lock = __import__("threading").Lock()
    report = preflight(subject(model))
    assert "cannot be copied" in report.skipped["initial loss"]
    assert "batch" in report.ran


def test_preflight_of_a_batch_that_cannot_be_copied_says_so():
    batch = [*labelled(), __import__("threading").Lock()]
    assert "cannot be copied" in preflight(subject(batch=batch)).skipped["modes"]


def test_preflight_without_memory_for_copies_does_not_blame_the_step():
    def step(model, batch):
        raise torch.OutOfMemoryError("no room")

    report = preflight(subject(step=step))
    assert not report.findings
    assert "no memory for a copy" in report.skipped["gradients"]


def test_preflight_without_optimizer_tells_which_checks_could_not_run():
    report = preflight(Subject(seeded(Classifier), classify, labelled()))
    assert {"optimizer", "duplicates", "learning rate"} <= set(report.skipped)
    assert not set(report.ran) & set(report.skipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "classes=1 must be at least 2"),
        ({"classes": 3, "one_vs_rest": 4}, "classes=3 and one_vs_rest=4"),
    ],
)
def test_expectations_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Expectations(**options)
