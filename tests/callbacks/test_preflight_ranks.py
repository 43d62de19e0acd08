"""The checks on two ranks: nobody waits, nothing changes, and both stop if one must."""

import warnings

import torch

from lit_stability import Preflight
from lit_stability.checks.preflight import PreflightError
from tests.distributed import run_ranks
from tests.rank_cases import Net, fit_rank, whole


class Poisoned(Net):
    """A batch that is NaN on rank 1."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x / (1 - self.global_rank), y), batch_idx)


def fits(root, name, cases):
    """The result of each fit on this rank."""
    warnings.simplefilter("ignore")
    return {label: result_of(root / label, name, *case) for label, case in cases.items()}


def result_of(root, name, callbacks, module):
    """Weights, buffers and report of a fit, or what it raised."""
    try:
        net, _ = fit_rank(root, name, callbacks, module=module, max_steps=4)
    except PreflightError as error:
        return str(error)
    report = callbacks[0].report if callbacks else None
    return whole(net.parameters()), whole([torch.zeros(1), *net.buffers()]), report


def test_preflight_under_ddp_changes_nothing_and_stops_all_ranks_if_one_has_an_error(tmp_path):
    """Invariants 1 and 5."""
    cases = {
        "bare": ([], Net),
        "checked": ([Preflight()], Net),
        "poisoned": ([Preflight(on_error="stop")], Poisoned),
    }
    for rank, each in enumerate(run_ranks(fits, tmp_path, "ddp", cases, folder=tmp_path)):
        weights, buffers, report = each["checked"]
        assert torch.equal(weights, each["bare"][0])
        assert torch.equal(buffers, each["bare"][1])
        assert "gradients" in report.ran
        assert not report.errors
        expected = ("another rank found the errors", "the first loss is")[rank]
        assert expected in each["poisoned"]


def test_preflight_under_fsdp2_says_why_it_did_not_look(tmp_path):
    cases = {"bare": ([], Net), "checked": ([Preflight(on_error="stop")], Net)}
    for each in run_ranks(fits, tmp_path, "fsdp2", cases, folder=tmp_path):
        weights, _, report = each["checked"]
        assert torch.equal(weights, each["bare"][0])
        assert "no rank has all weights" in report.skipped["all"]
