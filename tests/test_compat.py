"""What older versions lack is replaced: notes, emptied caches, compiled code below a mode."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from lit_stability.compat import CompiledCodeStaysCompiled, add_note, empty_device_cache


def test_notes_of_an_exception_are_kept_in_order():
    error = ValueError("a bug")
    add_note(error, "first")
    add_note(error, "second")
    assert error.__notes__ == ["first", "second"]


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="Python prints the note itself")
def test_note_that_python_does_not_print_is_logged(caplog):
    with caplog.at_level(logging.ERROR):
        add_note(ValueError("a bug"), "fit_with_recovery gave up")
    assert "fit_with_recovery gave up" in caplog.text


@pytest.fixture
def emptied(monkeypatch):
    """Which function emptied the cache, on a machine that seems to have an accelerator."""
    calls = []
    own = SimpleNamespace(empty_cache=lambda: calls.append("device"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: own)
    monkeypatch.setattr(
        torch.accelerator, "empty_cache", lambda: calls.append("accelerator"), raising=False
    )
    return calls


def test_cache_is_emptied_by_the_function_for_all_accelerators(emptied):
    empty_device_cache()
    assert emptied == ["accelerator"]


def test_cache_is_emptied_by_the_module_of_the_device_in_torch_2_8(emptied, monkeypatch):
    monkeypatch.delattr(torch.accelerator, "empty_cache")
    empty_device_cache()
    assert emptied == ["device"]


def test_cache_without_an_accelerator_is_not_touched(emptied, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    empty_device_cache()
    assert emptied == []


def test_function_compiled_below_the_mode_runs_compiled_there_and_afterwards():
    ran = []

    class Passes(CompiledCodeStaysCompiled):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph.forward(*args)

    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    with Passes():
        compiled(torch.ones(3))
    compiled(torch.ones(3))
    torch.compiler.reset()
    assert len(ran) == 2
