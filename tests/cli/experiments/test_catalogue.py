"""Which experiments a project has, and which of them a command means."""

import pytest

from lit_stability.cli.experiments.catalogue import catalogue, choose
from lit_stability.errors import ConfigError

CONFIGS = {"a_1": {"expect": {}}, "a_2": {"expect": {}}, "b": {"expect": None}, "part": {}}


@pytest.mark.parametrize(
    ("wanted", "everything", "chosen"),
    [
        (["b"], False, ["b"]),
        (["b", "a_*", "a_1"], False, ["b", "a_1", "a_2"]),
        (["*"], False, ["a_1", "a_2", "b"]),
        ([], True, ["a_1", "a_2", "b"]),
    ],
)
def test_choose_takes_names_and_patterns_each_once(wanted, everything, chosen):
    assert choose(CONFIGS, wanted, everything=everything) == chosen


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["a_3"], "a_3: no such experiment in configs/; did you mean a_"),
        (["c*", "b"], "c*: no such experiment in configs/; choose from a_1, a_2, b"),
        (["part"], "part: has no `expect`; run it with lit-stability fit"),
    ],
)
def test_choose_refuses_what_fits_nothing_with_what_there_is(wanted, message):
    with pytest.raises(ConfigError) as caught:
        choose(CONFIGS, wanted)
    assert message in str(caught.value)


def test_catalogue_without_a_folder_says_where_experiments_are_looked_for(tmp_path):
    with pytest.raises(ConfigError, match="experiments are the files in configs/"):
        catalogue(tmp_path / "configs")
