"""`QKClip` in real fits: logits stay bounded, and healthy runs and rollbacks stay exact."""

import csv
import logging

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule
from benchmarks.byte_gpt import loader as byte_loader
from lit_stability import AutoRollback, GradientMonitor, QKClip, stability_callbacks
from tests.callbacks.test_attention_probe import Compiled
from tests.conftest import by_hand, fit, flat, lines_of, make_trainer, regression_data
from tests.distributed import run_ranks
from tests.exact import Batches, differences, loader, run
from tests.probe_models import Attending
from tests.qk_clip_rank_cases import logits_of, rescaled
from tests.test_invariants import fp16_on_cpu

TINY = ByteGPTConfig(width=32, layers=1, length=32)


class Sharp(Attending):
    """Its logits are far above 1 from the beginning."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for attention in (self.first, self.second):
                attention.qkv.weight.mul_(4.0)


def suite(*callbacks, **options):
    return [GradientMonitor(), QKClip(**options), *callbacks]


class Plain(Sharp):
    """Without dropout."""

    rate = 1e-2

    def __init__(self):
        super().__init__()
        self.first.dropout = self.second.dropout = self.head[1].p = 0.0


class Still(Plain):
    """Weights that only a rescaling changes."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def at_a_high_rate(folder):
    """Runs at a learning rate of 0.1, with a threshold of 50 and with one that is never reached."""
    found = {}
    for threshold in (50.0, 1e9):
        callbacks = [*stability_callbacks(), QKClip(threshold)]
        root = folder / str(threshold)
        fit(
            root,
            callbacks,
            lambda: ByteGPTModule(TINY, lr=0.1, warmup=30),
            byte_loader(8, 32),
            logger=CSVLogger(root),
            max_steps=80,
        )
        text = next(root.rglob("metrics.csv")).read_text(encoding="utf8")
        rows = list(csv.DictReader(text.splitlines()))
        found[threshold] = callbacks, rows
    return found


def test_logits_at_a_high_learning_rate_stay_bounded(tmp_path):
    """The suite takes no rescaling for damage."""
    high_rate = at_a_high_rate(tmp_path)
    key = "stability/qk_logit/model.blocks.0"
    largest = {
        threshold: [float(row[key]) for row in rows if row.get(key)][-20:]
        for threshold, (_, rows) in high_rate.items()
    }
    callbacks, rows = high_rate[50.0]
    assert len(largest[50.0]) == 20
    assert max(largest[50.0]) < 0.3 * min(largest[1e9])
    assert callbacks[0].incidents == []
    assert callbacks[-1].rescaled["model.blocks.0"] >= callbacks[-1].steps > 10
    clipped = [float(row["stability/qk_clipped_heads"] or 0) for row in rows]
    assert sum(clipped) == callbacks[-1].rescaled["model.blocks.0"]
    assert not any("of_head" in name for name in rows[0])


def test_console_has_a_line_for_the_first_rescaling_and_one_at_the_end(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch.lit_stability")
    callbacks = suite(threshold=0.5)
    fit(tmp_path, callbacks, Still, loader(Batches()), max_steps=5)
    clip = callbacks[1]
    counts = f"first ({clip.rescaled['first']}), second ({clip.rescaled['second']})"
    lines = [line for line in lines_of(caplog) if "QKClip" in line]
    assert len(lines) == 2
    assert "of first, second with logits above 0.5" in lines[0]
    assert f"in {clip.steps} steps: {counts}" in lines[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-mixed"])
def test_heads_are_at_the_threshold_after_the_update(precision, tmp_path):
    """With a learning rate of 0 the next forward pass shows what the rescaling did.

    The first steps of fp16 overflow and are skipped; the second attention depends on the first.
    """
    options = {"plugins": fp16_on_cpu()} if precision == "16-mixed" else {"precision": precision}
    data = loader(Batches(1))
    module, _ = fit(tmp_path, suite(threshold=0.5), Still, data, max_steps=25, **options)
    module.log = lambda *args, **more: None
    batch = [t.to(module.embed.weight.dtype) for t in next(iter(data))]
    for found in logits_of(module, batch):
        assert found.max() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}]
)
def test_run_that_stays_below_the_threshold_is_bit_identical(options, tmp_path):
    """Invariant 1: weights, optimizer, generators, losses and metrics."""
    runs = [
        run(tmp_path / str(i), Attending, loader(Batches()), callbacks, max_epochs=2, **options)
        for i, callbacks in enumerate(([], suite(threshold=1e3)))
    ]
    assert differences(*runs) == {}


@pytest.mark.parametrize("every", [1, 4])
def test_bad_batch_is_undone_as_if_it_had_not_come(every, tmp_path):
    """Invariant 7, while heads are rescaled all the time; skipped steps rescale nothing."""
    found = []
    for name, data in {"nan": {"nan": (13,)}, "clean": {"left_out": (13,)}}.items():
        callbacks = suite(AutoRollback(), threshold=0.5, every=every)
        result = run(tmp_path / name, Sharp, loader(Batches(**data)), callbacks, max_epochs=1)
        found.append((result, callbacks[1].rescaled))
    assert differences(found[0][0], found[1][0]) == {}
    assert found[0][1] == found[1][1] != {}


def test_rollback_repeats_the_rescalings(tmp_path):
    """Damage that is found late: snapshots, restore and replay."""

    class Struck(Sharp):
        struck = False

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 14 and not type(self).struck:
                type(self).struck = True
                with torch.no_grad():
                    self.embed.weight[0, 0] = float("nan")

    Struck.struck, results = False, []
    for name in ("struck", "clean"):
        callbacks = suite(AutoRollback(), threshold=0.5)
        results.append(run(tmp_path / name, Struck, loader(Batches()), callbacks, max_epochs=1))
        assert len(callbacks[0].incidents) == (name == "struck")
    assert differences(*results) == {}


def test_run_that_is_resumed_goes_on_exactly(tmp_path):
    """The counts, and which step is measured next."""
    data, clips = loader(Batches(1)), [QKClip(0.5, every=5) for _ in range(3)]
    whole, _ = fit(tmp_path, [GradientMonitor(), clips[0]], Plain, data, max_steps=12)
    _, trainer = fit(tmp_path, [GradientMonitor(), clips[1]], Plain, data, max_steps=7)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed, module = make_trainer(tmp_path, [GradientMonitor(), clips[2]], max_steps=12), Plain()
    resumed.fit(module, data, ckpt_path=tmp_path / "saved.ckpt")
    assert torch.equal(flat(module), flat(whole))
    assert [clip.steps for clip in clips] == [3, 2, 3]


def test_manual_optimization_is_rescaled(tmp_path):
    callbacks = suite(threshold=0.5)
    fit(tmp_path, callbacks, by_hand(Sharp), max_steps=10)
    assert set(callbacks[1].rescaled) == {"first", "second"}


class WithNorm(Attending):
    """One of its attentions cannot be rescaled."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        attend = self.first.attend
        self.first.attend = lambda q, k, *more: attend(self.norm(q), self.norm(k), *more)


REPORTED = {
    "normalised queries": (WithNorm, "cannot rescale first: its queries are normalised"),
    "compiled": (Compiled, "is off: it cannot see into compiled parts"),
    "no attention": (None, "does nothing: no attention ran in modules='*'"),
}


@pytest.mark.parametrize(("module", "text"), REPORTED.values(), ids=REPORTED)
def test_what_is_not_rescaled_is_reported_once(module, text, tmp_path, caplog):
    fit(tmp_path, suite(threshold=1e3), module, data=regression_data(), max_steps=5)
    (line,) = [line for line in lines_of(caplog) if line.startswith("QKClip")]
    assert text in line


def test_sharded_weights_are_refused_with_the_way_out(tmp_path):
    trainer = make_trainer(tmp_path, suite(), strategy=ModelParallelStrategy(2, 1), devices=2)
    with pytest.raises(RuntimeError, match=r"does not support ModelParallelStrategy.*with DDP"):
        trainer.callbacks[1].setup(trainer, Attending(), "fit")


@pytest.mark.parametrize(
    ("options", "text"), [({"threshold": 0.0}, "threshold"), ({"every": 0}, "every")]
)
def test_wrong_option_is_refused_with_its_value(options, text):
    with pytest.raises(ValueError, match=f"{text} must be .*got 0"):
        QKClip(**options)


def test_both_ranks_rescale_by_the_largest_logit_of_both(tmp_path):
    first, second = run_ranks(rescaled, tmp_path, folder=tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    assert first["rescaled"] == second["rescaled"] != {}
    assert first["incidents"] == second["incidents"] == 0
    pairs = list(zip(first["logits"], second["logits"], strict=True))
    assert [max(pair) for pair in pairs] == pytest.approx([0.5] * 4, rel=1e-4)
    assert max(map(min, pairs)) < 0.499, "each rank has its own batches"
