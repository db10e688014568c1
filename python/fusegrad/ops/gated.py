"""Gated linear units: SwiGLU, GeGLU (exact and by tanh), ReGLU, and torch's GLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._activations import ACTIVATIONS
from .._autograd import Function, differentiable
from .._op import Op, Sample, check_tensor, compiled, dimension, integer, overridable, wide

gated_fwd = compiled("gated_fwd")
gated_bwd = compiled("gated_bwd")
_SWIGLU, _GEGLU, _GEGLU_TANH, _REGLU, _GLU = range(5)  # their numbers in csrc/ops/gated.cpp


def _reference(activation, gate, up, dim):
    g, u = gate.chunk(2, dim) if up is None else (gate, up)
    return (ACTIVATIONS[activation](wide(g), 0.0) * wide(u)).to(gate.dtype)


def swiglu_reference(gate: Tensor, up: Tensor | None, dim: int, number: int) -> Tensor:
    return _reference("silu", gate, up, dim)


def geglu_reference(gate: Tensor, up: Tensor | None, dim: int, number: int) -> Tensor:
    return _reference("gelu", gate, up, dim)


def geglu_tanh_reference(gate: Tensor, up: Tensor | None, dim: int, number: int) -> Tensor:
    return _reference("gelu_tanh", gate, up, dim)


def reglu_reference(gate: Tensor, up: Tensor | None, dim: int, number: int) -> Tensor:
    return _reference("relu", gate, up, dim)


def glu_reference(x: Tensor, up: None, dim: int, number: int) -> Tensor:
    u, g = x.chunk(2, dim)
    return _reference("sigmoid", g, u, dim)


@torch.library.register_fake("fusegrad::gated_fwd")
def _(gate, up, dim, number):
    if up is not None:
        return torch.empty_like(gate)
    shape = list(gate.shape)
    shape[dim] = shape[dim] // 2
    return gate.new_empty(shape)


@torch.library.register_fake("fusegrad::gated_bwd")
def _(dy, gate, up, dim, number, needed):
    dgate = gate.new_empty(gate.shape) if up is None else torch.empty_like(gate)
    return dgate if needed[0] else None, torch.empty_like(gate) if needed[1] and up is not None else None


class _GatedFn(Function):
    params, dim = (), -2

    @staticmethod
    def forward(gate, up, dim, number):
        return gated_fwd(gate, up, dim, number)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        gate, up, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dy):
        dgate = dup = None
        if dy is not None:
            dgate, dup = gated_bwd(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:2])
        return dgate, dup, None, None


class SwiGLUFn(_GatedFn):
    op = "swiglu"
    reference = staticmethod(swiglu_reference)


class GeGLUFn(_GatedFn):
    op = "geglu"
    reference = staticmethod(geglu_reference)


class GeGLUTanhFn(_GatedFn):
    op = "geglu_tanh"
    reference = staticmethod(geglu_tanh_reference)


class ReGLUFn(_GatedFn):
    op = "reglu"
    reference = staticmethod(reglu_reference)


class GLUFn(_GatedFn):
    op = "glu"
    reference = staticmethod(glu_reference)


def _packed(op: str, input: Tensor, dim: int) -> int:
    """The packed dimension, counted from the front."""
    if input.dim() == 0:
        raise RuntimeError(f"{op}: input must have at least one dimension, got a scalar")
    dim = dimension(op, input, dim)
    if input.shape[dim] % 2:
        raise RuntimeError(f"{op}: input must have an even size in dimension {dim}, got {list(input.shape)}")
    return dim


def _gated(fn: type[Function], number: int, gate: Tensor, up: Tensor | None, dim: int) -> Tensor:
    check_tensor(fn.op, "gate", gate)
    if up is None:
        dim = _packed(fn.op, gate, dim)
    else:
        check_tensor(fn.op, "up", up)
        if up.shape != gate.shape or up.dtype != gate.dtype:
            error = RuntimeError if up.dtype == gate.dtype else TypeError
            expected, fact = f"{gate.dtype} {list(gate.shape)}", f"{up.dtype} {list(up.shape)}"
            raise error(f"{fn.op}: up must have the dtype and shape of gate ({expected}), got {fact}")
        dim = 0
    return fn.call((gate, up), dim, number)


_DOC = r"""Gated linear unit with a {gate} gate:

    .. math:: y = {formula}

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
        y = (torch.nn.functional.{code} * up.float()).to(gate.dtype)

    Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.
    """


def _described(gate: str, formula: str, code: str):
    def decorate(functional):
        functional.__doc__ = _DOC.format(gate=gate, formula=formula, code=code)
        return functional

    return decorate


@_described("SiLU", r"\mathrm{silu}(\mathrm{gate}) \cdot \mathrm{up}, \quad \mathrm{silu}(g) = g / (1 + e^{-g})", "silu(gate.float())")
@overridable
def swiglu(gate: Tensor, up: Tensor | None = None, *, dim: int = -1) -> Tensor:
    return _gated(SwiGLUFn, _SWIGLU, gate, up, dim)


@_described("GELU", r"\mathrm{gelu}(\mathrm{gate}) \cdot \mathrm{up}, \quad \mathrm{gelu}(g) = g \Phi(g)", "gelu(gate.float())")
@overridable
def geglu(gate: Tensor, up: Tensor | None = None, *, dim: int = -1) -> Tensor:
    return _gated(GeGLUFn, _GEGLU, gate, up, dim)


@_described(
    "GELU (approximated by tanh)",
    r"\mathrm{gelu}(\mathrm{gate}) \cdot \mathrm{up}, \quad \mathrm{gelu}(g) = g (1 + \tanh(\sqrt{2 / \pi} (g + 0.044715 g^3))) / 2",
    "gelu(gate.float(), approximate='tanh')",
)
@overridable
def geglu_tanh(gate: Tensor, up: Tensor | None = None, *, dim: int = -1) -> Tensor:
    return _gated(GeGLUTanhFn, _GEGLU_TANH, gate, up, dim)


@_described("ReLU", r"\max(\mathrm{gate}, 0) \cdot \mathrm{up}", "relu(gate.float())")
@overridable
def reglu(gate: Tensor, up: Tensor | None = None, *, dim: int = -1) -> Tensor:
    return _gated(ReGLUFn, _REGLU, gate, up, dim)


@overridable
def glu(input: Tensor, dim: int = -1) -> Tensor:
    r"""Gated linear unit, the second half of a packed input being the gate:

    .. math:: y = a \cdot \sigma(b), \quad [a, b] = \mathrm{input}

    Drop-in for `torch.nn.functional.glu`.

    Args:
        input: `[*, 2 n, *]`, float32, float64, float16 or bfloat16, any layout.
        dim: the packed dimension.

    Returns:
        `[*, n, *]` of the input's dtype, computed in float32 (float64 for float64). Saved for backward: the input.

    Raises:
        RuntimeError: a packed dimension of odd size, a tensor that is not dense. IndexError: `dim` out of range.

    Equivalent eager code::

        a, b = input.float().chunk(2, dim)
        y = (a * torch.sigmoid(b)).to(input.dtype)

    Source: Dauphin et al., Language Modeling with Gated Convolutional Networks, 2016, arXiv:1612.08083.
    """
    check_tensor("glu", "input", input)
    return GLUFn.call((input, None), _packed("glu", input, dim), _GLU)


class _Gated(torch.nn.Module):
    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = integer(type(self).__name__, "dim", dim)

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return self.functional(gate, up, dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SwiGLU(_Gated):
    """`swiglu` as a module: `SwiGLU()(packed)` or `SwiGLU()(gate, up)`."""

    functional = staticmethod(swiglu)


class GeGLU(_Gated):
    """`geglu` as a module: `GeGLU()(packed)` or `GeGLU()(gate, up)`."""

    functional = staticmethod(geglu)


class GeGLUTanh(_Gated):
    """`geglu_tanh` as a module: `GeGLUTanh()(packed)` or `GeGLUTanh()(gate, up)`."""

    functional = staticmethod(geglu_tanh)


class ReGLU(_Gated):
    """`reglu` as a module: `ReGLU()(packed)` or `ReGLU()(gate, up)`."""

    functional = staticmethod(reglu)


class GLU(torch.nn.GLU):
    """`torch.nn.GLU` with a fused forward and backward. See `glu`."""

    def forward(self, input: Tensor) -> Tensor:
        return glu(input, self.dim)


def _packed_samples(make, name):
    yield Sample("packed", {name: make(5, 66)})
    yield Sample("packed_slice", {name: make(3, 5, 62, layout="row_strided")})
    yield Sample("packed_dim1", {name: make(2, 6, 7), "dim": 1})
    yield Sample("packed_dim0", {name: make(8, 3), "dim": 0})
    yield Sample("packed_column_strided", {name: make(3, 70, layout="column_strided")})
    yield Sample("packed_channels", {name: make(2, 4, 3, 5, layout="channels_last"), "dim": 1})
    yield Sample("no_rows", {name: make(0, 8)})


def _samples(make):
    yield from _packed_samples(make, "gate")
    yield Sample("pair", dict(gate=make(4, 33), up=make(4, 33)))
    yield Sample("fused_projection", dict(zip(("gate", "up"), make.chunks(2, 6, 34))))
    yield Sample("transposed", dict(gate=make(9, 34, layout="transposed"), up=make(9, 34, layout="transposed")))
    yield Sample("mixed_layouts", dict(gate=make(9, 35, layout="transposed"), up=make(9, 35)))
    yield Sample("expanded", dict(gate=make(6, 40, layout="expanded"), up=make(6, 40, layout="offset")))
    yield Sample("channels_last", dict(gate=make(2, 4, 3, 5, layout="channels_last"), up=make(2, 4, 3, 5, layout="channels_last")))
    yield Sample("one_element", dict(gate=make(1), up=make(1)))
    yield Sample("scalar", dict(gate=make(), up=make()))
    yield Sample("long", dict(gate=make(2, 9001), up=make(2, 9001)))


def _glu_samples(make):
    yield from _packed_samples(make, "input")
    yield Sample("packed_heads", dict(input=make(2, 5, 3, 12, layout="packed_heads")))
    yield Sample("transposed", dict(input=make(9, 34, layout="transposed"), dim=1))
    yield Sample("expanded", dict(input=make(6, 40, layout="expanded")))
    yield Sample("offset", dict(input=make(10, 7, layout="offset"), dim=-2))
    yield Sample("two_elements", dict(input=make(2)))
    yield Sample("long", dict(input=make(2, 18002)))


def _shards(gate, up, dim, number):
    return (dim,) if up is None else (), {}


def _row(cls, functional, reference, module):
    return Op(
        name=cls.op,
        fn=cls,
        functional=functional,
        reference=reference,
        samples=_samples,
        module=module,
        saved_bytes=lambda kwargs: kwargs["gate"].nbytes + (kwargs["up"].nbytes if "up" in kwargs else 0),
        shards=_shards,
        bench=lambda make, rows, cols: dict(gate=make(rows, 2 * cols)),
    )


SWIGLU = _row(SwiGLUFn, swiglu, swiglu_reference, SwiGLU)
GEGLU = _row(GeGLUFn, geglu, geglu_reference, GeGLU)
GEGLU_TANH = _row(GeGLUTanhFn, geglu_tanh, geglu_tanh_reference, GeGLUTanh)
REGLU = _row(ReGLUFn, reglu, reglu_reference, ReGLU)
GLU_ROW = Op(
    name="glu",
    fn=GLUFn,
    functional=glu,
    reference=glu_reference,
    samples=_glu_samples,
    module=GLU,
    torch=F.glu,
    saved_bytes=lambda kwargs: kwargs["input"].nbytes,
    shards=_shards,
    bench=lambda make, rows, cols: dict(input=make(rows, 2 * cols)),
)
