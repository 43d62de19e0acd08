import random

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from lit_stability.trainer_internals.step_exceptions import (
    may_come_from_numbers,
    quoted,
    raised_at,
)


def raised_by(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


NUMBERS = {
    "distribution": lambda: Normal(torch.tensor(torch.nan), 1.0, validate_args=True),
    "multinomial": lambda: torch.multinomial(torch.tensor([torch.nan, 1.0]), 1),
    "cholesky": lambda: torch.linalg.cholesky(-torch.eye(2)),
    "singular": lambda: torch.linalg.inv(torch.zeros(2, 2)),
    "numpy": lambda: np.linalg.cholesky(-np.eye(2)),
    "class out of range": lambda: torch.nn.functional.cross_entropy(
        torch.zeros(1, 3), torch.tensor([7])
    ),
    "index": lambda: torch.zeros(3)[torch.tensor([7])],
    "empty": lambda: torch.zeros(0).max(),
    "one sample": lambda: torch.nn.BatchNorm1d(2)(torch.zeros(1, 2)),
    "key": lambda: {}["token"],
    "integer": lambda: int(float("nan")),
    "division": lambda: 1 / 0,
}


@pytest.mark.parametrize("call", NUMBERS.values(), ids=[n.replace(" ", "-") for n in NUMBERS])
def test_exceptions_of_bad_numbers_are_recognised(call):
    error = raised_by(call)
    assert may_come_from_numbers(error)
    assert quoted(error).startswith(type(error).__name__.lstrip("_"))


@pytest.mark.parametrize(
    "error",
    [
        TypeError(),
        StopIteration(),
        OSError("disk full"),
        NotImplementedError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Expected all tensors to be on the same device, but found two"),
        RuntimeError("Caught an error; DataLoader worker (pid(s) 3) exited unexpectedly"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_exceptions_are_not(error):
    assert not may_come_from_numbers(error)


def test_quoted_error_is_one_short_line():
    text = quoted(ValueError("x" * 1000 + "\nsecond line"))
    assert "\n" not in text
    assert len(text) < 150
    assert quoted(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    "call",
    [
        lambda: Normal(torch.tensor(torch.nan), 1.0, validate_args=True),
        lambda: random.sample([1], 2),
    ],
    ids=["inside of torch", "inside of the standard library"],
)
def test_place_is_the_line_of_the_user(call):
    place = raised_at(raised_by(call))
    line = call.__code__.co_firstlineno
    assert place == f"test_step_exceptions.py:{line} in <lambda>"


def test_place_of_an_exception_that_was_never_raised_is_empty():
    assert raised_at(ValueError()) == ""
