"""Many small tensors measured together, against each measured alone."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from lit_stability.measurement.norms import (
    BatchedNorms,
    gradients_of,
    norms_and_peaks,
    norms_of,
    peaks_of,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MODELS = {
    "one shape": [(7, 3)] * 20,
    "shapes in turn, a large one between": [(5,), (40, 60), (3, 2)] * 12,
    "many parts": [(2000,)] * 300,
    "too few to stack": [(5,)] * 3,
    "scalars and empty ones": [(), (0, 4), (6,)] * 10,
    "convolutions": [(8, 4, 3, 3)] * 9,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def alone(tensors):
    """Norm and peak of each, in float64."""
    norms = [float(t.double().norm()) for t in tensors]
    return norms, [float(t.double().abs().max()) if t.numel() else 0.0 for t in tensors]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("model", MODELS)
def test_norms_and_peaks_are_those_of_each_tensor_in_its_place(model, dtype):
    """S6."""
    tensors = [torch.randn(shape).to(dtype) * (1 + i) for i, shape in enumerate(MODELS[model])]
    norms, peaks = alone(tensors)
    batched = BatchedNorms(tensors)
    (together,), (largest,) = batched.norms_and_peaks(tensors)
    (only_norms,) = batched.norms(tensors)
    assert together.tolist() == pytest.approx(norms, rel=2e-6)
    assert only_norms.tolist() == pytest.approx(norms, rel=2e-6)
    assert largest.tolist() == pytest.approx(peaks)
    assert {together.dtype, only_norms.dtype, largest.dtype} == {F32}


def test_norms_of_mixed_formats_and_layouts_are_those_of_each_tensor():
    tensors = [torch.randn(4, 5).to(dtype) for dtype in (F32, F16) for _ in range(10)]
    tensors += [torch.randn(9, 4, 3, 3).to(memory_format=torch.channels_last) for _ in range(9)]
    tensors += [torch.randn(5, 6).t() for _ in range(9)]
    for i, t in enumerate(tensors):
        t *= 1 + i
    norms, peaks = alone(tensors)
    (found,), (largest,) = BatchedNorms(tensors).norms_and_peaks(tensors)
    assert found.tolist() == pytest.approx(norms, rel=2e-6)
    assert largest.tolist() == pytest.approx(peaks)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_element_of_a_small_tensor_shows_in_its_own_norm_and_peak_alone(bad):
    """N1, S3."""
    tensors = [torch.ones(4) for _ in range(12)]
    tensors[7][2] = bad
    (norms,), (peaks,) = BatchedNorms(tensors).norms_and_peaks(tensors)
    for found in (norms, peaks):
        assert [i for i, x in enumerate(found.tolist()) if not math.isfinite(x)] == [7]


def test_norms_of_fewer_tensors_than_it_was_made_for_are_theirs():
    tensors = [torch.full((4,), float(i)) for i in range(12)]
    (found,) = BatchedNorms(tensors).norms(tensors[3:])
    assert found.tolist() == [2.0 * i for i in range(3, 12)]


def test_nothing_to_measure_gives_nothing():
    assert BatchedNorms([]).norms([]) == []
    assert norms_and_peaks([]) == ([], [])


def test_norms_and_peaks_of_few_tensors_are_those_that_are_taken_one_after_the_other():
    tensors = [torch.randn(300, 300), torch.randn(5).half(), torch.tensor([3.0 - 4.0j])]
    tensors += [torch.empty(0), torch.tensor([math.nan, 1.0])]
    (norms,), (peaks,) = norms_and_peaks(tensors)
    (apart,), (extremes,) = norms_of(tensors), peaks_of(tensors)
    assert norms.nan_to_num(-1).tolist() == pytest.approx(apart.nan_to_num(-1).tolist(), rel=1e-6)
    assert torch.equal(peaks.nan_to_num(-1), extremes.nan_to_num(-1))


def parameters(count):
    found = [nn.Parameter(torch.zeros(2, 3)) for _ in range(count)]
    for i, p in enumerate(found):
        p.grad = torch.full((2, 3), float(i))
    return tuple(f"p{i}" for i in range(count)), found


def test_gradients_are_complete_while_each_parameter_has_a_plain_one():
    names, found = parameters(10)
    grads = gradients_of(names, found)
    assert (grads.names, grads.complete) == (names, True)
    assert all(a is p.grad for a, p in zip(grads.tensors, found, strict=True))


def test_gradients_leave_out_a_parameter_without_one():
    names, found = parameters(10)
    found[3].grad = None
    grads = gradients_of(names, found)
    assert (len(grads.tensors), grads.complete) == (9, False)
    assert "p3" not in grads.names


# torch 2.11 gives this advice whatever `check_invariants` is.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_gradients_of_a_sparse_parameter_are_its_rows_and_not_complete():
    names, found = parameters(10)
    indices = torch.tensor([[1, 1]])
    found[4].grad = torch.sparse_coo_tensor(
        indices, torch.ones(2, 3), (2, 3), check_invariants=True
    )
    grads = gradients_of(names, found)
    assert not grads.complete
    assert grads.tensors[4].tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_a_large_half_precision_tensor_is_that_of_its_fp32_copy(dtype):
    tensor = torch.randn(3 * 2**20 + 7).to(dtype)
    expected = tensor.double().norm()
    for (norms,) in (norms_of([tensor]), norms_and_peaks([tensor])[0]):
        assert norms[0].double() == pytest.approx(float(expected), rel=1e-4)
    turned = tensor[: 2**21].reshape(2, 2**20).t()
    assert float(norms_of([turned])[0][0]) == pytest.approx(float(turned.double().norm()), rel=1e-4)


def test_norm_of_a_large_half_precision_tensor_needs_no_copy_of_it():
    """In a process of its own, as the peak of a process never falls."""
    code = """
import resource, torch
from lit_stability.measurement.norms import norms_and_peaks, norms_of
torch.set_num_threads(1)
small, large = (torch.ones(n, dtype=torch.bfloat16) for n in (2**16, 100 * 2**20))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
norms_of([small]), norms_and_peaks([small])
before = peak()
norms_of([large]), norms_and_peaks([large])
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200, "MiB; the tensor has 200, a copy in fp32 400"
