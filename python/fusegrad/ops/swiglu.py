"""SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .._autograd import Function, differentiable
from .._op import Op, Sample, check_tensor, compiled, wide

swiglu_fwd = compiled("swiglu_fwd")
swiglu_bwd = compiled("swiglu_bwd")


def swiglu_reference(gate: Tensor, up: Tensor | None, dim: int) -> Tensor:
    g, u = (gate.chunk(2, dim)) if up is None else (gate, up)
    return (wide(g) * torch.sigmoid(wide(g)) * wide(u)).to(gate.dtype)


@torch.library.register_fake("fusegrad::swiglu_fwd")
def _(gate, up, dim):
    if up is not None:
        return torch.empty_like(gate)
    shape = list(gate.shape)
    shape[dim] = shape[dim] // 2
    return gate.new_empty(shape)


@torch.library.register_fake("fusegrad::swiglu_bwd")
def _(dy, gate, up, dim, needed):
    dgate = gate.new_empty(gate.shape) if up is None else torch.empty_like(gate)
    return dgate if needed[0] else None, torch.empty_like(gate) if needed[1] and up is not None else None


class SwiGLUFn(Function):
    op = "swiglu"
    reference = staticmethod(swiglu_reference)

    @staticmethod
    def forward(gate, up, dim):
        return swiglu_fwd(gate, up, dim)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        gate, up, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dy):
        dgate = dup = None
        if dy is not None:
            dgate, dup = swiglu_bwd(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:2])
        return dgate, dup, None


def swiglu(gate: Tensor, up: Tensor | None = None, *, dim: int = -1) -> Tensor:
    r"""Gated linear unit with a SiLU gate:

    .. math:: y = \mathrm{silu}(\mathrm{gate}) \cdot \mathrm{up}, \quad \mathrm{silu}(g) = g / (1 + e^{-g})

    Args:
        gate: `[*]`, float32, float64, float16 or bfloat16, any layout. Without `up` it is packed, `[*, 2 n, *]`: along `dim` the first
            half is the gate and the second half goes up (`torch.nn.functional.glu` has them the other way round).
        up: the shape and dtype of `gate`. Slices of one fused projection are read where they lie, without a copy.
        dim: the packed dimension. Unused with `up`.

    Returns:
        The dtype of `gate`; its shape, or `[*, n, *]` if packed. Computed in float32 (float64 for float64). Saved for backward:
        the inputs; the activation is recomputed.

    Raises:
        TypeError: two dtypes. RuntimeError: two shapes or devices, a packed dimension of odd size, a tensor that is not dense.
        IndexError: `dim` out of range.

    Equivalent eager code::

        gate, up = gate.chunk(2, dim) if up is None else (gate, up)
        y = (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)

    Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.
    """
    if has_torch_function((gate, up)):
        return handle_torch_function(swiglu, (gate, up), gate, up, dim=dim)
    check_tensor("swiglu", "gate", gate)
    if up is not None:
        check_tensor("swiglu", "up", up)
        if up.shape != gate.shape or up.dtype != gate.dtype:
            error = RuntimeError if up.dtype == gate.dtype else TypeError
            expected, fact = f"{gate.dtype} {list(gate.shape)}", f"{up.dtype} {list(up.shape)}"
            raise error(f"swiglu: up must have the dtype and shape of gate ({expected}), got {fact}")
        dim = 0
    else:
        if not -gate.dim() <= dim < gate.dim():
            raise IndexError(f"swiglu: dim must be in [{-gate.dim()}, {gate.dim() - 1}] for input {list(gate.shape)}, got {dim}")
        dim %= gate.dim()
        if gate.shape[dim] % 2:
            raise RuntimeError(f"swiglu: input must have an even size in dimension {dim}, got {list(gate.shape)}")
    return SwiGLUFn.call((gate, up), dim)


class SwiGLU(torch.nn.Module):
    """`swiglu` as a module: `SwiGLU()(packed)` or `SwiGLU()(gate, up)`."""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return swiglu(gate, up, dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _samples(make):
    yield Sample("packed", dict(gate=make(5, 66)))
    yield Sample("pair", dict(gate=make(4, 33), up=make(4, 33)))
    yield Sample("packed_slice", dict(gate=make(3, 5, 62, layout="row_strided")))
    yield Sample("fused_projection", dict(zip(("gate", "up"), make.chunks(2, 6, 34))))
    yield Sample("packed_dim1", dict(gate=make(2, 6, 7), dim=1))
    yield Sample("packed_dim0", dict(gate=make(8, 3), dim=0))
    yield Sample("transposed", dict(gate=make(9, 34, layout="transposed"), up=make(9, 34, layout="transposed")))
    yield Sample("mixed_layouts", dict(gate=make(9, 35, layout="transposed"), up=make(9, 35)))
    yield Sample("packed_column_strided", dict(gate=make(3, 70, layout="column_strided")))
    yield Sample("expanded", dict(gate=make(6, 40, layout="expanded"), up=make(6, 40, layout="offset")))
    yield Sample("channels_last", dict(gate=make(2, 4, 3, 5, layout="channels_last"), up=make(2, 4, 3, 5, layout="channels_last")))
    yield Sample("packed_channels", dict(gate=make(2, 4, 3, 5, layout="channels_last"), dim=1))
    yield Sample("one_element", dict(gate=make(1), up=make(1)))
    yield Sample("scalar", dict(gate=make(), up=make()))
    yield Sample("no_rows", dict(gate=make(0, 8)))
    yield Sample("long", dict(gate=make(2, 9001), up=make(2, 9001)))


SWIGLU = Op(
    name="swiglu",
    fn=SwiGLUFn,
    functional=swiglu,
    reference=swiglu_reference,
    samples=_samples,
    module=SwiGLU,
    saved_bytes=lambda kwargs: kwargs["gate"].nbytes + (kwargs["up"].nbytes if "up" in kwargs else 0),
    bench=lambda make, rows, cols: dict(gate=make(rows, 2 * cols)),
)
