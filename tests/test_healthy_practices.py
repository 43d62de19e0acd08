"""Practices that look like trouble and are none: the run ends as it does without the suite."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from lit_stability import GradientMonitor, stability_callbacks
from lit_stability.callbacks.auto_rollback import AutoRollback
from lit_stability.incidents.verdict import verdict_of
from tests.conftest import Regression, fit, flat, regression_data


class Writing(Regression):
    """Writes to its weights in a hook, by one of the usual ways."""

    def __init__(self, way, every):
        super().__init__(dropout=0.0)
        self.way, self.every = way, every

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step % self.every == 0:
            with torch.no_grad():
                WAYS[self.way](self.net)


def shrink_and_perturb(net):
    for p in net.parameters():
        p.mul_(0.5).add_(torch.randn_like(p), alpha=0.05)


def prune(net):
    weight = net[0].weight.data
    weight[weight.abs() < weight.abs().median()] = 0


WAYS = {
    "reset of a layer": lambda net: net[-1].reset_parameters(),
    "shrink and perturb": shrink_and_perturb,
    "pruning by data": prune,
    "load_state_dict": lambda net: net[0].load_state_dict(
        {name: 3 * value for name, value in net[0].state_dict().items()}
    ),
    "rows on a sphere": lambda net: net[0].weight.copy_(5 * nn.functional.normalize(net[0].weight)),
}


def ends(tmp_path, module, **options):
    """Weights of the runs without and with the suite, and the suite."""
    suite = stability_callbacks()
    options = {"max_steps": 200, "max_epochs": -1, "data": regression_data(400), **options}
    bare = fit(tmp_path / "bare", [], module, **options)[0]
    return flat(bare), flat(fit(tmp_path / "suite", suite, module, **options)[0]), suite


@pytest.mark.each_value
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [30, 70])
def test_weights_written_on_purpose_cost_one_rollback_and_change_nothing(way, every, tmp_path):
    bare, with_suite, suite = ends(tmp_path, lambda: Writing(way, every))
    assert torch.equal(bare, with_suite)
    assert sum("rolled back" in r for i in suite[0].incidents for r in i.responses) <= 1
    rollback = next(c for c in suite if isinstance(c, AutoRollback))
    assert rollback.backoff.lr_factor == 1.0


def test_weights_written_by_a_callback_change_nothing(tmp_path):
    class Reset(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 90:
                pl_module.net[0].reset_parameters()

    module = lambda: Regression(dropout=0.0)  # noqa: E731
    bare = fit(tmp_path / "bare", [Reset()], module, max_steps=150)[0]
    suite = fit(tmp_path / "suite", [Reset(), *stability_callbacks()], module, max_steps=150)[0]
    assert torch.equal(flat(bare), flat(suite))


def test_monitor_alone_reports_written_weights_a_few_times_and_no_more(tmp_path):
    monitor = GradientMonitor()
    fit(
        tmp_path,
        [monitor],
        lambda: Writing("reset of a layer", 30),
        data=regression_data(400),
        max_steps=400,
        max_epochs=-1,
    )
    assert len(monitor.incidents) <= 3


class Auxiliary(Regression):
    """Adds a second loss, with much larger gradients, to some of its steps."""

    def __init__(self, factor, chosen):
        super().__init__(dropout=0.0)
        self.factor, self.chosen = factor, chosen

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.factor if self.chosen(batch_idx) else loss


CHOSEN = {
    "every 40th": lambda i: i % 40 == 39,
    "every 7th": lambda i: i % 7 == 6,
    "three in a hundred": lambda i: (
        torch.Generator().manual_seed(i).initial_seed() * 7919 % 100 < 3
    ),
}


@pytest.mark.each_value
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("factor", [30.0, 300.0])
def test_large_gradients_that_come_back_are_clipped_at_most_a_few_times(factor, chosen, tmp_path):
    bare, with_suite, suite = ends(
        tmp_path, lambda: Auxiliary(factor, CHOSEN[chosen]), max_steps=300
    )
    responses = [r for i in suite[0].incidents for r in i.responses]
    assert set(responses) <= {"step retried", "gradients clipped"}
    assert responses.count("gradients clipped") <= 4
    assert (bare - with_suite).norm() < 0.1 * bare.norm()


FAULTS = {"constant": lambda loss: loss * float("nan"), "domain": lambda loss: torch.log(-loss)}


@pytest.mark.each_value
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["1", "2"])
def test_fault_of_one_batch_index_costs_few_batches_and_is_named(fault, options, tmp_path):
    class Periodic(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return FAULTS[fault](loss) if batch_idx % 16 == 5 else loss

    suite = stability_callbacks()
    module, trainer = fit(
        tmp_path, suite, Periodic, regression_data(64), max_steps=-1, max_epochs=3, **options
    )
    window = options.get("accumulate_grad_batches", 1)
    assert trainer.global_step >= 3 * 64 / window - 16
    assert torch.isfinite(flat(module)).all()
    assert {i.cause for i in suite[0].incidents} == {"fault of one batch index"}
    # It comes back in each epoch, so that there is something to do.
    verdict = verdict_of([i.as_dict() for i in suite[0].incidents])
    assert verdict.to_do.startswith("look at what training_step does at this batch_idx only")
    assert sum(r == "step skipped" for i in suite[0].incidents for r in i.responses) <= 3


def loader(batches):
    return DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("bad", [3, 5])
def test_bad_batches_in_a_row_are_not_taken_for_a_fault_of_their_index(bad, tmp_path):
    batches = [tuple(batch) for batch in regression_data(40)]
    nans = [(x * float("nan"), y) for x, y in batches[20 : 20 + bad]]
    spoiled = batches[:20] + nans + batches[20 + bad :]
    without = batches[:20] + batches[20 + bad :]
    suite = stability_callbacks()
    module, _ = fit(tmp_path / "a", suite, data=loader(spoiled), max_steps=-1, max_epochs=1)
    twin, _ = fit(tmp_path / "b", data=loader(without), max_steps=-1, max_epochs=1)
    assert torch.equal(flat(module), flat(twin))
    assert suite[0].incidents[0].cause == "bad batch"


def test_random_draw_that_fails_costs_a_batch_and_is_named(tmp_path):
    class Draws(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if torch.rand(()) < 0.03 else loss

    suite = stability_callbacks()
    module, trainer = fit(
        tmp_path, suite, Draws, data=regression_data(400), max_steps=200, max_epochs=-1
    )
    assert trainer.global_step == 200
    assert torch.isfinite(flat(module)).all()
    assert {i.cause for i in suite[0].incidents} == {"random draw of the step"}
    assert sum(r == "step skipped" for i in suite[0].incidents for r in i.responses) <= 12
