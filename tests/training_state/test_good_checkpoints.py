"""Where good checkpoints lie, and how the run behind them ended."""

import json
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_stability import find_last_good
from lit_stability.training_state.good_checkpoints import (
    RunEnd,
    free_path,
    good_files,
    put_aside,
    step_of,
)


def put(path, whole=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not whole:
        path.write_bytes(b"half of a checkpoint")
        return path
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("step/data.pkl", "x")
    return path


def test_newest_step_is_found_at_any_depth(tmp_path):
    put(tmp_path / "version_0/good/step=00000900.ckpt")
    newest = put(tmp_path / "version_1/good/step=00001000.ckpt")
    put(tmp_path / "version_1/good/step=00000090.ckpt")
    assert find_last_good(tmp_path) == find_last_good(newest.parent) == newest
    assert find_last_good(str(tmp_path / "version_0")).name == "step=00000900.ckpt"


@pytest.mark.parametrize(
    "other",
    ["good.1/step=00002000.ckpt", "incidents/step=00002000.ckpt", "good/.part-step=00002000.ckpt"],
)
def test_file_that_is_no_good_checkpoint_is_passed_over(other, tmp_path):
    good = put(tmp_path / "good/step=00000010.ckpt")
    put(tmp_path / other)
    put(tmp_path / "good/step=00003000.ckpt", whole=False)
    assert find_last_good(tmp_path) == good


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert find_last_good(tmp_path) is None
    assert find_last_good(tmp_path / "missing") is None


def test_number_that_is_taken_gets_a_suffix_and_the_later_file_counts(tmp_path):
    names = [put(free_path(tmp_path / "good", 7)).name for _ in range(3)]
    assert names == ["step=00000007.ckpt", "step=00000007-v1.ckpt", "step=00000007-v2.ckpt"]
    assert [step_of(f) for f in good_files(tmp_path / "good")] == [7, 7, 7]
    assert find_last_good(tmp_path).name == names[-1]


def test_folder_is_put_aside_only_with_files_in_it(tmp_path):
    (tmp_path / "good").mkdir()
    put_aside(tmp_path / "good")
    assert (tmp_path / "good").is_dir()
    for number in (1, 2):
        file = put(tmp_path / "good/step=00000007.ckpt")
        put_aside(file.parent)
        assert not file.parent.exists()
        assert (tmp_path / f"good.{number}" / file.name).is_file()


def test_end_of_a_run_comes_back_as_it_was_written(tmp_path):
    end = RunEnd(state="failed", step=3, reason="ValueError: \u00fc", checkpoint="a", failures=2)
    end.write(tmp_path / "new")
    assert RunEnd.read(tmp_path / "new") == end
    assert not list((tmp_path / "new").glob(".part*"))
    assert end.in_words() == "failed at step 3: ValueError: \u00fc"


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"schema": 2}', "{", '{"schema": 1}', '{"schema": 1, "state": "odd"}']
)
def test_file_that_is_no_end_of_a_run_counts_as_none(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert RunEnd.read(tmp_path) is None
    assert RunEnd.read(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000 + "]" * 3000,
        '{"schema": 1, "state": []}',
        '{"schema": 1, "state": "failed", "failures": "3"}',
        '{"schema": 1, "state": "failed", "failures": -5}',
        '{"schema": 1, "state": "failed", "reason": null}',
        '{"schema": 1, "state": "failed", "step": true}',
    ],
)
def test_damaged_end_of_a_run_is_logged_with_its_file_and_ignored(text, tmp_path, caplog):
    (tmp_path / "run.json").write_text(text)
    assert RunEnd.read(tmp_path) is None
    assert f"{tmp_path / 'run.json'} is" in caplog.text


@settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.binary(max_size=40)
    | st.dictionaries(
        st.sampled_from(sorted(RunEnd.__dataclass_fields__)),
        st.none() | st.integers() | st.text(max_size=9) | st.lists(st.none()),
    ).map(lambda found: json.dumps({"schema": 1, "state": "failed"} | found).encode())
)
def test_any_content_is_the_end_of_a_run_or_none(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    found = RunEnd.read(tmp_path)
    assert found is None or found.failures_behind(tmp_path) >= 0
    assert found is None or isinstance(found.in_words(), str)
