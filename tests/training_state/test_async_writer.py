"""Checkpoints written in the background, completely or not at all."""

import os
import threading

import pytest
import torch

from lit_stability.training_state import async_writer
from lit_stability.training_state.async_writer import AsyncCheckpointWriter, write_whole
from lit_stability.training_state.good_checkpoints import good_files, step_of


def write(writer, state, step, **options):
    writer.write(state, step, **options)
    writer.join()


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_newest_files_stay_and_later_ones_are_unchanged(tmp_path):
    writer = AsyncCheckpointWriter(tmp_path / "good", keep=2)
    for step in (50, 10, 20, 30):
        write(writer, {"step": step}, step)
    assert [step_of(f) for f in good_files(tmp_path / "good")] == [20, 30, 50]
    assert torch.load(writer.newest, weights_only=True) == {"step": 30}


def test_write_runs_in_the_background_and_its_thread_ends_with_it(tmp_path, monkeypatch):
    gate = threading.Event()
    save = torch.save
    monkeypatch.setattr(async_writer.torch, "save", lambda *args: gate.wait(10) and save(*args))
    writer = AsyncCheckpointWriter(tmp_path, keep=2)
    writer.write({"a": 1}, 1)
    assert writer.busy
    assert good_files(tmp_path) == []
    gate.set()
    writer.join()
    assert not writer.busy
    assert len(good_files(tmp_path)) == 1


@pytest.mark.parametrize("place", ["save", "fsync", "replace"])
def test_failure_leaves_what_was_there_and_nothing_else(place, tmp_path, monkeypatch, caplog):
    """Invariant 10."""
    writer = AsyncCheckpointWriter(tmp_path, keep=1)
    write(writer, {"step": 1}, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    owner = async_writer.torch if place == "save" else os
    with monkeypatch.context() as patched:
        patched.setattr(owner, place, full)
        write(writer, {"step": 2}, 2)
        write(writer, {"step": 3}, 3)
    assert names(tmp_path) == ["step=00000001.ckpt"]
    assert caplog.text.count("No space left on device") == 1
    write(writer, {"step": 4}, 4)
    assert names(tmp_path) == ["step=00000004.ckpt"]


def test_non_finite_state_is_refused_and_named(tmp_path, caplog):
    writer = AsyncCheckpointWriter(tmp_path, keep=1)
    state = {"state_dict": {"w": torch.tensor([float("nan")])}}
    write(writer, state, 5)
    assert names(tmp_path) == []
    assert "no good checkpoint written at step 5: w is non-finite" in caplog.text
    write(writer, state, 5, constants=["w"])
    assert names(tmp_path) == ["step=00000005.ckpt"]


def test_file_has_its_name_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def recorded(*args, name=name, original=original):
            order.append(name)
            return original(*args)

        monkeypatch.setattr(os, name, recorded)
    write_whole({"a": 1}, tmp_path / "x.ckpt")
    assert order == ["fsync", "replace", "fsync"], "the file, its name, the folder"
