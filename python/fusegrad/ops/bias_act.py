"""Bias, activation and scale in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .._activations import ACTIVATIONS, activate, number
from .._autograd import Function, differentiable
from .._op import Op, Sample, check_tensor, compiled, dimension, integer, overridable, real, wide

bias_act_fwd = compiled("bias_act_fwd")
bias_act_bwd = compiled("bias_act_bwd")


def bias_act_reference(x: Tensor, b: Tensor | None, act: int, scale: float, slope: float, dim: int) -> Tensor:
    z = wide(x) if b is None else wide(x) + wide(b).reshape(-1, *[1] * (x.dim() - 1 - dim))
    return (activate(z, act, slope) * scale).to(x.dtype)


def _as_rows(x, dim):
    """An empty result: the bias's dimension is the innermost one in memory if it is so in x."""
    if dim < x.dim() - 1 and x.stride(dim) == 1:
        return x.new_empty(x.movedim(dim, -1).shape).movedim(-1, dim)
    return x.new_empty(x.shape)


@torch.library.register_fake("fusegrad::bias_act_fwd")
def _(x, b, act, scale, slope, dim):
    return torch.empty_like(x) if b is None else _as_rows(x, dim)


@torch.library.register_fake("fusegrad::bias_act_bwd")
def _(dy, x, b, act, scale, slope, dim, needed):
    dx = torch.empty_like(x) if b is None else _as_rows(x, dim)
    return dx if needed[0] else None, torch.empty_like(b) if needed[1] and b is not None else None


class BiasActFn(Function):
    op = "bias_act"
    reference = staticmethod(bias_act_reference)
    params, dim = (1,), -1

    @staticmethod
    def forward(x, b, act, scale, slope, dim):
        return bias_act_fwd(x, b, act, scale, slope, dim)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, b, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dy):
        dx = db = None
        if dy is not None:
            dx, db = bias_act_bwd(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:2])
        return dx, db, None, None, None, None

    @classmethod
    def of_samples(cls, ctx, samples, dy):
        if dy.itemsize == 2:  # the input's gradient is rounded
            return super().of_samples(ctx, samples, dy)
        *options, dim = cls.deeper(ctx.options, len(samples))
        dx, _ = bias_act_bwd(dy, *ctx.saved_tensors, *options, dim, (True, False))
        others = [d for d in range(len(samples), dx.dim()) if d != dim]
        db = (dx.sum(others) if others else dx.clone()) if ctx.needs_input_grad[1] else None
        return [dx, db, None, None, None, None]


@overridable
def bias_act(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "gelu",
    *,
    scale: float = 1.0,
    negative_slope: float = 0.01,
    dim: int = -1,
) -> Tensor:
    r"""Bias, activation and scale in one pass, and in another one their gradients:

    .. math:: y = \mathrm{scale} \cdot \mathrm{act}(\mathrm{input} + \mathrm{bias})

    Args:
        input: `[*, C, *]`, float32, float64, float16 or bfloat16, any layout.
        bias: `[C]`, of the input's dtype, or float32 with a 16-bit input; or None.
        activation: identity, relu, leaky_relu, sigmoid, tanh, exp, square, cube, squared_relu, gelu, gelu_tanh, silu, softplus, elu,
            mish or hardswish; None is the identity. Values, and derivatives at a corner, are torch's.
        scale: a number.
        negative_slope: of leaky_relu; unused by the others.
        dim: the dimension that the bias belongs to: 1 for `[N, C, H, W]`, in either memory format. Unused without a bias.

    Returns:
        The shape and dtype of `input`, computed in float32 (float64 for float64). Saved for backward: input and bias; the sum and
        the activation are recomputed, and the gradient of the bias is summed in float32 as that of the input is written.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape or device that does not fit, a tensor that is not
        dense. ValueError: an unknown activation. IndexError: `dim` out of range.

    Equivalent eager code::

        z = input.float() if bias is None else input.float() + bias.float().reshape(-1, *[1] * (input.dim() - 1 - dim % input.dim()))
        act = torch.nn.functional.gelu  # for example
        y = (scale * act(z)).to(input.dtype)

    Source: Tillet et al., Triton, 2019, doi:10.1145/3315508.3329973 (fusing what is element by element).
    """
    check_tensor("bias_act", "input", input)
    act = number("bias_act", activation)
    if bias is None:
        dim = 0
    else:
        check_tensor("bias_act", "bias", bias)
        if input.dim() == 0:
            raise RuntimeError("bias_act: input must have at least one dimension for a bias, got a scalar")
        dim = dimension("bias_act", input, dim)
        if bias.shape != input.shape[dim : dim + 1]:
            fact = f"(input is {list(input.shape)}, its dimension {dim}), got {list(bias.shape)}"
            raise RuntimeError(f"bias_act: bias must have shape [{input.shape[dim]}] {fact}")
    return BiasActFn.call((input, bias), act, real("bias_act", "scale", scale), real("bias_act", "negative_slope", negative_slope), dim)


class BiasAct(torch.nn.Module):
    """`bias_act` as a module with a bias of its own (zero at first), of `num_features` elements; None for no bias."""

    def __init__(self, num_features: int | None, activation="gelu", *, scale=1.0, negative_slope=0.01, dim=-1, device=None, dtype=None):
        super().__init__()
        number("BiasAct", activation)
        real("BiasAct", "scale", scale), real("BiasAct", "negative_slope", negative_slope), integer("BiasAct", "dim", dim)
        self.num_features, self.activation = num_features, activation
        self.options = dict(scale=scale, negative_slope=negative_slope, dim=dim)
        self.bias = None if num_features is None else torch.nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return bias_act(input, self.bias, self.activation, **self.options)

    def extra_repr(self) -> str:
        return f"{self.num_features}, activation={self.activation!r}, " + ", ".join(f"{k}={v}" for k, v in self.options.items())


def _samples(make):
    yield Sample("plain", dict(input=make(5, 33), bias=make.param(33)))
    for name in ACTIVATIONS:
        yield Sample(name, dict(input=make(5, 33, scale=3), bias=make.param(33), activation=name))
    for name in ("gelu", "relu", "sigmoid"):
        yield Sample(f"{name}_map", dict(input=make(3, 4, 18, layout="row_strided", scale=3), activation=name, scale=0.5))
    yield Sample("slope", dict(input=make(6, 40), bias=make.param(40), activation="leaky_relu", negative_slope=0.2, scale=2.0))
    yield Sample("slope_map", dict(input=make(6, 41, layout="transposed"), activation="leaky_relu", negative_slope=-0.3))
    yield Sample("transposed", dict(input=make(19, 35, layout="transposed"), bias=make.param(35), activation="silu"))
    yield Sample("expanded", dict(input=make(6, 66, layout="expanded"), bias=make.param(66, layout="column_strided")))
    yield Sample("packed_heads", dict(input=make(2, 3, 5, 48, layout="packed_heads"), bias=make.param(48), activation="relu"))
    yield Sample("image", dict(input=make(2, 5, 3, 7), bias=make.param(5), activation="silu", dim=1))
    yield Sample("image_channels_last", dict(input=make(2, 5, 3, 7, layout="channels_last"), bias=make.param(5), dim=1, scale=1.5))
    yield Sample("image_row_strided", dict(input=make(3, 4, 2, 6, layout="row_strided"), bias=make.param(4), activation="mish", dim=-3))
    yield Sample("first_dim", dict(input=make(7, 50), bias=make.param(7), activation="tanh", dim=0))
    yield Sample("one_dim", dict(input=make(31, layout="column_strided"), bias=make.param(31), activation="softplus"))
    yield Sample("none", dict(input=make(4, 9, layout="offset"), bias=make.param(9), activation=None, scale=-1.0))
    yield Sample("scalar", dict(input=make(), activation="elu"))
    yield Sample("no_rows", dict(input=make(0, 8), bias=make.param(8)))
    yield Sample("no_pixels", dict(input=make(2, 3, 0), bias=make.param(3), dim=1))
    yield Sample("long", dict(input=make(2, 9001), bias=make.param(9001), activation="gelu_tanh"))


BIAS_ACT = Op(
    name="bias_act",
    fn=BiasActFn,
    functional=bias_act,
    reference=bias_act_reference,
    samples=_samples,
    module=BiasAct,
    saved_bytes=lambda kwargs: sum(kwargs[k].nbytes for k in ("input", "bias") if k in kwargs),
    shards=lambda x, b, act, scale, slope, dim: ((), {1: (dim,)}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), bias=make.param(cols), activation="gelu"),
    layout_bits=False,  # of an image the bias's gradient is summed by columns or by rows
)
