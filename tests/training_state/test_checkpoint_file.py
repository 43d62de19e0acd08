"""A checkpoint with any bit flipped, or cut anywhere, is told from one that is whole."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_stability import find_last_good
from lit_stability.training_state.checkpoint_file import damage_of, first_whole

FIXED = settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a checkpoint, and where the numbers of its tensor are."""
    path = tmp_path_factory.mktemp("saved") / "step=00000010.ckpt"
    weights = torch.arange(500.0)
    torch.save({"state_dict": {"w": weights}, "epoch": 0, "global_step": 10}, path)
    content = path.read_bytes()
    return content, content.index(weights.numpy().tobytes())


@FIXED
@given(data=st.data())
def test_bit_flipped_in_a_tensor_is_found_though_torch_loads_it(data, saved, tmp_path):
    content, start = saved
    at = data.draw(st.integers(start, start + 1999))
    flipped = bytearray(content)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(flipped)
    torch.load(path, weights_only=True)
    assert "Bad CRC-32" in damage_of(path)


@FIXED
@given(data=st.data())
def test_file_cut_anywhere_or_of_other_bytes_is_damaged_and_never_raises(data, saved, tmp_path):
    content, _ = saved
    cut = st.integers(0, len(content) - 1).map(lambda end: content[:end])
    path = tmp_path / "cut.ckpt"
    path.write_bytes(data.draw(cut | st.binary(max_size=200)))
    assert damage_of(path)


@FIXED
@given(data=st.data())
def test_any_change_of_a_file_gives_an_answer_and_no_exception(data, saved, tmp_path):
    changed = bytearray(saved[0])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.ckpt"
    path.write_bytes(changed)
    assert damage_of(path) is None or isinstance(damage_of(path), str)


@pytest.mark.parametrize("checksums", [True, False])
def test_whole_file_has_no_damage_with_or_without_checksums(checksums, tmp_path):
    path = tmp_path / "whole.ckpt"
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save({"w": torch.ones(5), "empty": torch.ones(0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert damage_of(path) is None


def test_good_checkpoint_before_a_damaged_one_is_found_and_the_damage_is_logged(
    saved, tmp_path, caplog
):
    content, start = saved
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "step=00000010.ckpt").write_bytes(content)
    (folder / "step=00000020.ckpt").write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        assert find_last_good(tmp_path) == folder / "step=00000010.ckpt"
    assert "step=00000020.ckpt is ignored: it is damaged" in caplog.text


def test_folder_counts_as_whole(tmp_path):
    assert first_whole([tmp_path / "missing.ckpt", tmp_path]) == tmp_path
