"""The memory behind tensors of all kinds."""

import pytest
import torch
from torch import nn

from lit_stability.training_state.snapshot import BufferGuard, ModuleSnapshot
from lit_stability.training_state.tensor_parts import apart, has_usual_memory, memory_of, parts
from tests.foreign_tensors import Int8Params, Packed

PACKED = Packed(torch.ones(4, 4, dtype=torch.int8), torch.tensor(0.5))
with torch.inference_mode():
    INFERENCE = torch.ones(2)
SPARSE = torch.eye(4).to_sparse()


@pytest.mark.parametrize(
    ("tensor", "nbytes", "usual"),
    [
        (torch.zeros(3), 12, True),
        (torch.zeros(3, dtype=torch.bfloat16), 6, True),
        (torch.zeros(0), 0, True),
        (nn.Parameter(torch.zeros(3)), 12, True),
        (Int8Params(torch.zeros(3, 1, dtype=torch.int8)), 3, True),
        (PACKED, 16 + 4, False),
        (torch.zeros(3, device="meta"), 0, False),
        (nn.UninitializedParameter(), 0, False),
        (INFERENCE, 0, True),
        (SPARSE, 4 * (16 + 4), False),
    ],
)
def test_memory_of_a_tensor_is_that_of_its_content(tensor, nbytes, usual):
    assert memory_of(tensor) == nbytes
    assert has_usual_memory(tensor) == usual


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("convert", ["to_sparse_csr", "to_sparse_csc"])
def test_compressed_sparse_tensor_counts_its_indices(convert):
    assert memory_of(getattr(torch.eye(4), convert)()) == 8 * 5 + 8 * 4 + 4 * 4


def test_wrapper_inside_of_a_wrapper_is_followed_to_its_memory():
    outer = Packed(PACKED, torch.tensor(2.0))
    assert [t.shape for t in parts(outer)] == [(4, 4), (), ()]


def test_wrapper_that_names_no_parts_has_none():
    class Opaque(Packed):
        __tensor_flatten__ = property()

    assert parts(Opaque(torch.ones(2), torch.ones(()))) == []


def test_wrappers_are_taken_apart_and_others_are_left_whole():
    plain, empty = torch.zeros(2), torch.zeros(2, device="meta")
    own, inner = apart([plain, PACKED, empty])
    assert own == [plain]
    assert inner[0] is PACKED.data_int8


class Holder(nn.Module):
    """A buffer and a trained weight of which the content is in wrappers."""

    def __init__(self):
        super().__init__()
        self.before = nn.Parameter(torch.ones(2))
        self.weight = nn.Parameter(Packed.of(torch.ones(2, 2)), requires_grad=True)
        self.register_buffer("first", torch.zeros(1))
        self.register_buffer("packed", Packed.of(torch.ones(3)))
        self.register_buffer("last", torch.tensor([torch.nan]))


def test_trained_wrapper_is_restored_from_a_snapshot_in_its_own_memory():
    module = Holder()
    snapshot = ModuleSnapshot()
    snapshot.capture(module)
    memory = module.weight.data_int8
    memory.zero_()
    module.packed.scale.zero_()
    snapshot.restore()
    assert module.weight.data_int8 is memory
    assert memory.tolist() == [[127, 127], [127, 127]]
    assert float(module.packed.scale) > 0
    assert snapshot.nbytes == 8 + (4 + 4) + 4 + (3 + 4) + 4


@pytest.mark.parametrize("kind", [ModuleSnapshot, BufferGuard])
def test_non_finite_buffer_beside_a_wrapper_is_found_by_its_name(kind):
    module = Holder()
    snapshot = kind() if kind is ModuleSnapshot else kind(module)
    snapshot.capture(*([module] if kind is ModuleSnapshot else []))
    assert snapshot.non_finite_buffers() == {(id(module), "last")}


def test_buffer_that_is_replaced_between_two_captures_is_guarded():
    module = Holder()
    guard = BufferGuard(module)
    guard.capture()
    module.first = torch.tensor([5.0])
    guard.capture()
    module.first.zero_()
    guard.restore()
    assert float(module.first) == 5
