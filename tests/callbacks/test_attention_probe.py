"""The probe in real fits: what it reads, when, and that nothing is changed by it."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule
from benchmarks.byte_gpt import loader as byte_loader
from lit_stability import AttentionProbe, GradientMonitor, stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from models.translation.config import TransformerConfig
from models.translation.datamodule import TranslationDataModule
from models.translation.module import TranslationModule
from tests.conftest import by_hand, fit, lines_of
from tests.distributed import run_ranks
from tests.exact import Batches, differences, loader, run
from tests.probe_models import Attending
from tests.probe_rank_cases import both


class StepRecorder(Callback):
    """Readings by step, and whether anything was installed in a backward pass."""

    def __init__(self):
        self.readings, self.installed = {}, []

    def on_step_measured(self, trainer, pl_module, stats):
        if stats.readings:
            self.readings[stats.step] = {(r.quantity, r.where): r.value for r in stats.readings}

    def on_before_backward(self, trainer, pl_module, loss):
        found = len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks)
        self.installed.append(found + (_get_current_dispatch_mode() is not None))


def probed(root, module=Attending, probe=None, **options):
    recorded_step = StepRecorder()
    callbacks = [GradientMonitor(), probe or AttentionProbe(every=10), recorded_step]
    net, trainer = fit(root, callbacks, module, **options)
    assert not any(recorded_step.installed)
    return net, trainer, recorded_step


class Watched(Attending):
    """Notes the batches in whose forward pass something is installed."""

    def __init__(self):
        super().__init__()
        self.watched = []

    def training_step(self, batch, batch_idx):
        if hooks._global_forward_hooks or _get_current_dispatch_mode() is not None:
            self.watched.append(batch_idx)
        return super().training_step(batch, batch_idx)


class Compiled(Attending):
    def configure_model(self):
        self.embed.compile(backend="eager")


PRECISIONS = {"32-true": {}, "bf16-mixed": {"precision": "bf16-mixed"}}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_run_with_the_probe_is_bit_identical(precision, accumulate, tmp_path):
    """Invariant 1: weights, optimizer, generators, losses and metrics."""
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, **PRECISIONS[precision]}
    runs = [
        run(tmp_path / str(i), Attending, loader(Batches()), callbacks, **options)
        for i, callbacks in enumerate(([], [GradientMonitor(), AttentionProbe(every=2)]))
    ]
    assert differences(*runs) == {}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 10, 20]),
        ({"module": by_hand(Attending)}, [0, 10, 20]),
        ({"accumulate_grad_batches": 2}, [0, 10, 20]),
        ({"probe": AttentionProbe("second", every=25)}, [0, 25]),
    ],
)
def test_probe_reads_on_its_steps_and_leaves_nothing_installed(options, steps, tmp_path):
    _, trainer, recorded_step = probed(tmp_path, max_steps=30, **options)
    assert list(recorded_step.readings) == steps
    wanted = {"second"} if "probe" in options else {"first", "second"}
    for found in recorded_step.readings.values():
        assert {where for _, where in found} == wanted
        assert all(0 < v <= 1 for (quantity, _), v in found.items() if "entropy" in quantity)
    assert "training_step" not in vars(trainer.strategy)


@pytest.mark.parametrize(("accumulate", "batches"), [(1, [0, 10]), (3, [0, 30])])
def test_one_forward_pass_of_a_probed_step_is_watched_and_no_other(accumulate, batches, tmp_path):
    options = {"accumulate_grad_batches": accumulate, "max_steps": 15}
    net, _, _ = probed(tmp_path, Watched, **options)
    assert net.watched == batches


def test_probe_is_silent_about_a_step_that_another_callback_takes(tmp_path):
    """A bad step is run again in isolation; the probe sees only the step in training."""
    suite, recorded_step = stability_callbacks(), StepRecorder()
    callbacks = [FaultInjector([NanLoss(step=10)]), *suite, AttentionProbe(every=10), recorded_step]
    _, trainer = fit(tmp_path, callbacks, Attending, max_steps=30)
    assert trainer.global_step == 30
    assert list(recorded_step.readings) == [0, 10, 20]


def test_compiled_model_is_reported_once_and_not_measured(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        _, _, recorded_step = probed(
            tmp_path, Compiled, max_steps=12, probe=AttentionProbe(every=5)
        )
    assert recorded_step.readings == {}
    assert [r for r in lines_of(caplog) if "compiled parts" in r] == [
        "AttentionProbe measures nothing: it cannot see into compiled parts of the model"
    ]
    torch.compiler.reset()


def test_model_without_attention_is_reported_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        fit(tmp_path, [GradientMonitor(), AttentionProbe(every=5)], max_steps=12)
    assert [r for r in lines_of(caplog) if "AttentionProbe" in r] == [
        "AttentionProbe measures nothing: no attention ran in modules='*'"
    ]


def test_glob_that_fits_no_module_is_refused_at_the_start(tmp_path):
    with pytest.raises(
        ValueError, match=r"modules='decoder\.\*' matches no module; there are 'embed'"
    ):
        probed(tmp_path, probe=AttentionProbe("decoder.*"))


def test_every_out_of_range_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        AttentionProbe(every=0)


@pytest.mark.parametrize(
    ("rate", "steps", "kinds"),
    [
        (0.1, 221, ["attention-logit growth", "attention collapse"]),
        (1e-3, 121, []),
        (1e-2, 121, []),
    ],
)
def test_logits_that_grow_at_a_high_learning_rate_are_reported(rate, steps, kinds, tmp_path):
    """S5: an architectural cause, known by what it does long before the run is lost."""
    config = ByteGPTConfig(width=64, layers=1, length=32)
    monitor = GradientMonitor()
    fit(
        tmp_path,
        [monitor, AttentionProbe("model.blocks.*", every=20)],
        lambda: ByteGPTModule(config, lr=rate, warmup=100),
        data=byte_loader(16, 32),
        max_steps=steps,
    )
    assert [i.first.kind for i in monitor.incidents] == kinds


def test_healthy_translation_is_silent(tmp_path):
    """T1."""
    shape = TransformerConfig(
        d_model=32, n_heads=4, d_feedforward=64, n_encoder_layers=1, n_decoder_layers=1
    )
    monitor, recorded_step = GradientMonitor(), StepRecorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            tmp_path,
            [monitor, AttentionProbe(every=20), recorded_step],
            lambda: TranslationModule(network=shape, n_decoded_val=0),
            data=TranslationDataModule(n_train=2000, batch_size=32),
            max_steps=61,
            limit_val_batches=0,
        )
    assert monitor.incidents == []
    names = {where for _, where in recorded_step.readings[60]}
    assert len(names) == 3, "self-attention of both, and the decoder's to the encoder"


def test_both_ranks_have_the_same_readings_and_the_weights_they_have_without(tmp_path):
    first, second = run_ranks(both, tmp_path, folder=tmp_path)
    assert first[True]["readings"] == second[True]["readings"]
    steps = dict(first[True]["readings"])
    assert list(steps) == [0, 5, 10]
    quantities = ("attention_logit", "attention_entropy")
    wanted = {(q, w) for q in quantities for w in ("first", "second")} | {("curvature_ratio", "")}
    assert all({(q, w) for q, w, _ in found} == wanted for found in steps.values())
    for rank in (first, second):
        assert torch.equal(rank[True]["weights"], rank[False]["weights"])
        assert rank[True]["losses"] == rank[False]["losses"]
    assert first[True]["losses"] != second[True]["losses"]
