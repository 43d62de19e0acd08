"""Healthy kinds: the bare runs are healthy, and the comparison sees what differs."""

from dataclasses import replace

import pytest
import torch

from benchmarks.healthy.judge import NotHealthyError, compare, different_parts
from benchmarks.healthy.kind import Kind, is_healthy
from benchmarks.healthy.networks import Net, Writing
from benchmarks.healthy.report import everything, line, summary
from benchmarks.healthy.run import digest, run
from benchmarks.healthy.table import KINDS, QUICK, select

CLAMPED = KINDS["weights clamped each step, optimizer_step, .data"]
RESET = KINDS["last layer reset every 100 steps, module hook"]


@pytest.mark.parametrize(
    "name",
    [CLAMPED.name, "rows projected to unit norm each step, training_step"],
)
def test_kind_without_incident_is_silent_and_in_the_tables(name):
    comparison = compare(replace(KINDS[name], steps=120))
    assert comparison.verdict == "silent"
    assert comparison.different == ()
    assert comparison.steps == (120, 120)
    assert line(comparison).endswith(f"{name}: -")
    assert summary([comparison]).rows[-1] == ["all", "1", "1", "0", "0", "0"]
    assert everything([comparison]).rows[0][:3] == [name, comparison.practice, "silent"]


def test_bare_run_is_healthy_although_the_last_layer_is_reset():
    bare = run(RESET, 0, with_suite=False)
    assert (bare.ended, bare.steps, bare.incidents) == ("finished", RESET.steps, [])
    assert is_healthy(bare.values, RESET.floor)


def test_runs_with_another_seed_differ_in_weights_and_generators():
    short = replace(CLAMPED, steps=5)
    one, same, other = (run(short, seed, with_suite=False) for seed in (0, 0, 1))
    assert different_parts(one, same) == ()
    assert {"weights", "optimizer", "generators", "metrics"} <= set(different_parts(one, other))


def test_kind_that_does_not_learn_is_reported_as_not_healthy():
    kind = Kind(name="k", group="g", practice="Learns nothing.", module=lambda: Net(loss=constant))
    with pytest.raises(NotHealthyError, match=r"'k': the value goes from 1\.0 to 1\.0"):
        compare(replace(kind, steps=20))


def constant(net, batch):
    return 1.0 + 0.0 * net(batch[0]).mean()


def test_kind_that_fails_without_the_suite_is_reported_as_not_healthy():
    kind = Kind(name="k", group="g", practice="Fails.", module=lambda: Writing(lambda m: m.missing))
    with pytest.raises(NotHealthyError, match="the bare run crashed: AttributeError"):
        compare(replace(kind, steps=20))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        ({"lr": 0.1}, {"lr": 0.2}),
        ([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]),
    ],
)
def test_digest_of_other_bits_differs(one, other):
    assert digest(one) != digest(other)


def test_table_has_many_kinds_each_described_in_a_sentence():
    assert len(KINDS) >= 150
    for name, kind in KINDS.items():
        assert name == kind.name
        assert kind.practice[0].isupper() or kind.practice[0] in "`0123456789"
        assert kind.practice.endswith(".")
        assert "|" not in kind.practice


def test_quick_run_has_every_group():
    assert {KINDS[name].group for name in QUICK} == {kind.group for kind in KINDS.values()}


def test_selection_by_text_finds_kinds_or_names_the_text():
    assert RESET in select(["last layer reset", "clamped"])
    with pytest.raises(ValueError, match="no kind has 'no such' in its name"):
        select(["no such"])
