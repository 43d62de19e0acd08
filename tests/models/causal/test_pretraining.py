"""Pretraining of the embedded backbone."""

import dataclasses
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from models.causal import pretraining
from models.causal.pretraining import Recipe, embedded_folder, pretrain
from tests.models.causal.conftest import TINY


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_STABILITY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_recipe_gives_the_same_weights_twice_and_touches_no_generator(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in ("a", "b"):
        pretrain(TINY, tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_training_teaches_the_sentences(tmp_path):
    losses = [
        pretrain(dataclasses.replace(TINY, n_steps=n, lr=1e-2), tmp_path / str(n)) for n in (1, 120)
    ]
    assert losses[1] < 0.75 * losses[0]


def test_embedded_trunk_is_made_once_by_whoever_comes_first(cache):
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(embedded_folder(TINY))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (folder,) = set(folders)
    made = os.stat(folder / "model.safetensors").st_mtime_ns
    assert embedded_folder(TINY) == folder
    assert os.stat(folder / "model.safetensors").st_mtime_ns == made


def test_broken_off_making_leaves_nothing_that_looks_made(cache, monkeypatch):
    def broken(recipe, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("no space left")

    monkeypatch.setattr(pretraining, "pretrain", broken)
    with pytest.raises(RuntimeError, match="no space left"):
        embedded_folder(TINY)
    assert not [each for each in cache.iterdir() if each.is_dir()]
    monkeypatch.undo()


def test_another_recipe_has_another_place():
    assert Recipe().key == Recipe().key
    assert Recipe(seed=1).key != Recipe().key
