"""Tensors as libraries for quantisation put them into modules, built small; and rare kinds."""

import torch
from torch import nn
from torch.utils._pytree import tree_map_only


class Packed(torch.Tensor):
    """A weight as int8 with a scale, which only knows the operations that its layer needs.

    As torchao's: a wrapper subclass without memory of its own.
    """

    @staticmethod
    def __new__(cls, data, scale, dtype=torch.float32):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)

    def __init__(self, data, scale, dtype=torch.float32):
        self.data_int8, self.scale = data, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().max() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["data_int8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["data_int8"], inner["scale"])

    def dequantize(self):
        return self.data_int8.to(torch.float32) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].data_int8, args[0].scale)
        known = ("mm", "addmm", "t", "linear", "mul", "sub", "_to_copy", "permute", "transpose")
        if func.__name__.split(".")[0] in known:
            plain = tree_map_only(Packed, Packed.dequantize, (args, kwargs or {}))
            return func(*plain[0], **plain[1])
        raise NotImplementedError(f"{cls.__name__} does not implement {func}")


class Int8Params(nn.Parameter):
    """As that of bitsandbytes: int8 data with its statistics in attributes."""

    def __new__(cls, data, requires_grad=False):
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.CB, made.SCB = made.data, torch.ones(len(data))
        return made


class OnTop(nn.Module):
    """A trained net of two layers, between which something else is applied."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 1)

    def between(self, x):
        return x

    def forget(self):
        """Removes what Lightning cannot move back to the host after a fit."""

    def forward(self, x):
        return self.after(self.between(self.before(x)))


class PackedWeight(OnTop):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(Packed.of(torch.randn(8, 8)), requires_grad=False)

    def between(self, x):
        return x @ self.weight.dequantize().t()


class PackedAttribute(OnTop):
    """Keeps a wrapper in an attribute, which is no buffer."""

    def __init__(self):
        super().__init__()
        self.table = Packed.of(torch.randn(8, 8))

    def between(self, x):
        return x @ self.table.dequantize().t()


class Int8Weight(OnTop):
    def __init__(self):
        super().__init__()
        self.weight = Int8Params(torch.randint(-127, 127, (8, 8), dtype=torch.int8))

    def between(self, x):
        return x @ (self.weight.float() / 127)


class QuantisedBuffer(OnTop):
    def __init__(self):
        super().__init__()
        weight = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
        self.register_buffer("table", weight)
        channels = torch.quantize_per_channel(
            torch.randn(8, 8),
            torch.full((8,), 0.1),
            torch.zeros(8, dtype=torch.long),
            0,
            torch.qint8,
        )
        self.register_buffer("channels", channels)

    def between(self, x):
        return x @ self.table.dequantize() + x @ self.channels.dequantize()


class MetaWeight(OnTop):
    """Gets a part without content at its first forward pass; Lightning moves none to a device."""

    def between(self, x):
        if not hasattr(self, "unused"):
            self.unused = nn.Linear(8, 8, device="meta")
            self.norm = nn.BatchNorm1d(8, device="meta")
        return x

    def forget(self):
        del self.unused, self.norm


class PackedBuffer(OnTop):
    """Its table is a wrapper, into whose memory each forward pass writes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", Packed.of(torch.randn(8, 8)))

    def between(self, x):
        if self.training:
            self.table.scale.mul_(1.001)
        return x @ self.table.dequantize().t()


class SparseBuffer(OnTop):
    def __init__(self):
        super().__init__()
        self.register_buffer("coo", torch.eye(8).to_sparse())
        self.register_buffer("csr", torch.eye(8).to_sparse_csr())

    def between(self, x):
        return torch.sparse.mm(self.coo, x.t()).t()


class Float8Weight(OnTop):
    def __init__(self):
        super().__init__()
        data = torch.randn(8, 8).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(data, requires_grad=False)

    def between(self, x):
        return x @ self.weight.float()


class RareTypes(OnTop):
    """Buffers of rare dtypes, and one without elements."""

    def __init__(self):
        super().__init__()
        for dtype in ("uint8", "uint16", "uint64", "bool", "complex64", "float8_e5m2"):
            self.register_buffer(dtype, torch.ones(3).to(getattr(torch, dtype)))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("bits", torch.ones(4, dtype=torch.uint8).view(torch.bits8))


class InferenceBuffer(OnTop):
    def __init__(self):
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("mean", torch.zeros(8))
            self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def between(self, x):
        return x - self.mean.clone()


class PackedMoments(torch.optim.Optimizer):
    """SGD with momentum that is kept in int8 with a scale, as in optimizers of eight bits."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [p for group in self.param_groups for p in group["params"]]
        for p in (p for p in trained if p.grad is not None):
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = Packed.of(torch.ones_like(p) * 1e-3)
            packed = state["momentum"]
            new = Packed.of(0.9 * packed.dequantize() + p.grad + 1e-8)
            packed.data_int8.copy_(new.data_int8)
            packed.scale.copy_(new.scale)
            p.sub_(self.param_groups[0]["lr"] * packed.dequantize())
        return loss


FOREIGN = {
    "packed weight": PackedWeight,
    "packed buffer": PackedBuffer,
    "packed attribute": PackedAttribute,
    "int8 weight": Int8Weight,
    "quantised buffer": QuantisedBuffer,
    "meta weight": MetaWeight,
    "sparse buffer": SparseBuffer,
    "float8 weight": Float8Weight,
    "rare types": RareTypes,
    "inference buffer": InferenceBuffer,
}
