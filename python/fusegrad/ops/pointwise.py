"""The smallest ops, each with its own way to keep what its backward needs: nothing, the output, the input; and gradient reversal."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import Function, differentiable
from .._op import Op, Sample, autocast, check_tensor, compiled, is_traced, overridable, real, wide

pointwise_fwd = compiled("pointwise_fwd")
pointwise_bwd = compiled("pointwise_bwd")
_SCALE, _EXP, _CUBE, _GRAD_REVERSE = range(4)  # their numbers in csrc/ops/pointwise.cpp


@torch.library.register_fake("fusegrad::pointwise_fwd")
def _(x, number, factor):
    return torch.empty_like(x)


@torch.library.register_fake("fusegrad::pointwise_bwd")
def _(dy, saved, number, factor):
    return torch.empty_like(dy)


# --- scale: saves nothing ----------------------------------------------------------------------------------------------------


def scale_reference(x: Tensor, factor: float) -> Tensor:
    return (wide(x) * factor).to(x.dtype)


class ScaleFn(Function):
    op = "scale"
    reference = staticmethod(scale_reference)
    params = ()

    @staticmethod
    def forward(x, factor):
        return pointwise_fwd(x, _SCALE, factor)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, *ctx.options = inputs
        ctx.set_materialize_grads(False)

    @differentiable(formula=lambda ctx, saved, dy: (scale_reference(dy, *ctx.options),))
    def backward(ctx, dy):
        return None if dy is None else pointwise_bwd(dy, None, _SCALE, *ctx.options), None


@overridable
def scale(input: Tensor, factor: float) -> Tensor:
    r"""Multiplication by a constant:

    .. math:: y = \mathrm{factor} \cdot x

    Args:
        input: `[*]`, float32, float64, float16 or bfloat16, any layout.
        factor: a number. A tensor is refused: a gradient that it might expect would be lost.

    Returns:
        The shape, dtype and memory order of `input`. Saved for backward: nothing.

    Raises:
        TypeError: a factor that is not a number. RuntimeError: a tensor that is not dense.

    Equivalent eager code::

        y = input * factor

    Source: the PyTorch documentation, Extending torch.autograd (MulConstant).
    """
    check_tensor("scale", "input", input)
    return ScaleFn.call((input,), real("scale", "factor", factor))


class Scale(torch.nn.Module):
    """`scale` by a constant factor as a module."""

    def __init__(self, factor: float):
        super().__init__()
        real("Scale", "factor", factor)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return scale(input, self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


# --- exp: saves its output ---------------------------------------------------------------------------------------------------


def exp_reference(x: Tensor) -> Tensor:
    return torch.exp(wide(x)).to(x.dtype)


class ExpFn(Function):
    op = "exp"
    reference = staticmethod(exp_reference)
    params = ()

    @staticmethod
    def forward(x):
        return pointwise_fwd(x, _EXP, 0.0)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.options = ()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(outputs)

    # The output hangs on the input: the product is right to any order.
    @differentiable(formula=lambda ctx, saved, dy: ((wide(dy) * wide(saved[0])).to(dy.dtype),))
    def backward(ctx, dy):
        return None if dy is None else pointwise_bwd(dy, *ctx.saved_tensors, _EXP, 0.0)


@overridable
def exp(input: Tensor) -> Tensor:
    r"""The exponential function, which keeps its output for the backward and not its input:

    .. math:: y = e^x, \quad \mathrm{d}x = \mathrm{d}y \cdot y

    Args:
        input: `[*]`, float32, float64, float16 or bfloat16, any layout.

    Returns:
        The shape, dtype (float32 under CUDA autocast, as torch) and memory order of `input`. Saved for backward: the output.

    Raises:
        RuntimeError: a tensor that is not dense.

    Equivalent eager code::

        y = torch.exp(input)

    Source: the PyTorch documentation, torch.autograd.Function (Exp).
    """
    check_tensor("exp", "input", input)
    if input.is_cuda and autocast(input) and input.dtype != torch.float64:
        input = input.float()
    return ExpFn.call((input,))


class Exp(torch.nn.Module):
    """`exp` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return exp(input)


# --- cube: saves its input ---------------------------------------------------------------------------------------------------


def cube_reference(x: Tensor) -> Tensor:
    return (wide(x) * wide(x) * wide(x)).to(x.dtype)


class CubeFn(Function):
    op = "cube"
    reference = staticmethod(cube_reference)
    params = ()

    @staticmethod
    def forward(x):
        return pointwise_fwd(x, _CUBE, 0.0)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.options = ()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dy):
        return None if dy is None else pointwise_bwd(dy, *ctx.saved_tensors, _CUBE, 0.0)


@overridable
def cube(input: Tensor) -> Tensor:
    r"""The third power:

    .. math:: y = x^3, \quad \mathrm{d}x = 3 x^2 \, \mathrm{d}y

    Args:
        input: `[*]`, float32, float64, float16 or bfloat16, any layout.

    Returns:
        The shape, dtype and memory order of `input`. Saved for backward: the input.

    Raises:
        RuntimeError: a tensor that is not dense.

    Equivalent eager code::

        y = (input.float() ** 3).to(input.dtype)

    Source: the PyTorch tutorial, Double Backward with Custom Functions.
    """
    check_tensor("cube", "input", input)
    return CubeFn.call((input,))


class Cube(torch.nn.Module):
    """`cube` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return cube(input)


# --- gradient reversal: a view ------------------------------------------------------------------------------------------------


def grad_reverse_reference(x: Tensor, alpha: float) -> Tensor:
    if is_traced() or torch.compiler.is_compiling():  # which keep no hook
        turned = scale_reference(x, -alpha)
        return x.detach() + (turned - turned.detach())
    y = x.view_as(x)
    if y.requires_grad:
        y.register_hook(lambda dy: scale_reference(dy, -alpha))
    return y


class GradReverseFn(Function):
    op = "grad_reverse"
    reference = staticmethod(grad_reverse_reference)
    params = ()

    @staticmethod
    def forward(x, alpha):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, *ctx.options = inputs
        ctx.set_materialize_grads(False)

    @differentiable(formula=lambda ctx, saved, dy: (scale_reference(dy, -ctx.options[0]),))
    def backward(ctx, dy):
        return None if dy is None else pointwise_bwd(dy, None, _GRAD_REVERSE, -ctx.options[0]), None


@overridable
def grad_reverse(input: Tensor, alpha: float = 1.0) -> Tensor:
    r"""The identity, through which gradients go with another sign and scale:

    .. math:: y = x, \quad \mathrm{d}x = -\alpha \, \mathrm{d}y

    Between a feature extractor and a domain classifier it trains the one against the other.

    Args:
        input: `[*]`, float32, float64, float16 or bfloat16, any layout.
        alpha: a number, by which the gradient is multiplied beside its sign. It may change from call to call.

    Returns:
        A view of `input`, which torch allows no in-place operation on where it has a gradient: one that follows needs a `clone()`.
        Saved for backward: nothing.

    Raises:
        TypeError: an alpha that is not a number. RuntimeError: a tensor that is not dense.

    Equivalent eager code::

        y = input.view_as(input)
        if y.requires_grad:
            y.register_hook(lambda dy: -alpha * dy)

    Source: Ganin & Lempitsky, Unsupervised Domain Adaptation by Backpropagation, 2014, arXiv:1409.7495.
    """
    check_tensor("grad_reverse", "input", input)
    return GradReverseFn.call((input,), real("grad_reverse", "alpha", alpha))


class GradientReversal(torch.nn.Module):
    """`grad_reverse` as a module; `alpha` may be set anew at any time."""

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        real("GradientReversal", "alpha", alpha)
        self.alpha = alpha

    def forward(self, input: Tensor) -> Tensor:
        return grad_reverse(input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def _inputs(make):
    yield "plain", make(5, 33)
    yield "scalar", make()
    yield "one_element", make(1)
    yield "no_rows", make(0, 8)
    yield "three_dims", make(2, 3, 17)
    yield "row_strided", make(6, 40, layout="row_strided")
    yield "column_strided", make(7, 21, layout="column_strided")
    yield "transposed", make(9, 34, layout="transposed")
    yield "expanded", make(6, 40, layout="expanded")
    yield "offset", make(4, 31, layout="offset")
    yield "channels_last", make(2, 3, 4, 5, layout="channels_last")
    yield "packed_heads", make(2, 3, 5, 12, layout="packed_heads")
    yield "long", make(2, 9001)


def _row(cls, functional, reference, module, option=None, **fields):
    options = () if option is None else (option,)

    def samples(make):
        for i, (name, x) in enumerate(_inputs(make)):
            yield Sample(name, dict(input=x) | dict.fromkeys(options, (-0.75, 2.0, 1e-3)[i % 3]))

    return Op(
        name=cls.op,
        fn=cls,
        functional=functional,
        reference=reference,
        samples=samples,
        module=module,
        shards=lambda *_: ((), {}),
        bench=lambda make, rows, cols: dict(input=make(rows, cols)) | dict.fromkeys(options, 1.5),
        **fields,
    )


SCALE = _row(ScaleFn, scale, scale_reference, Scale, "factor", torch=lambda input, factor: input * factor, saved_bytes=lambda kwargs: 0)
EXP = _row(
    ExpFn,
    exp,
    exp_reference,
    Exp,
    torch=torch.exp,
    rounding=lambda kwargs: 1.51,  # the output is rounded before the gradient is
    saved_bytes=lambda kwargs: kwargs["input"].nbytes,
)
CUBE = _row(CubeFn, cube, cube_reference, Cube, saved_bytes=lambda kwargs: kwargs["input"].nbytes)
GRAD_REVERSE = _row(
    GradReverseFn, grad_reverse, grad_reverse_reference, GradientReversal, "alpha",
    kernels=("pointwise_bwd",), true_gradient=False, saved_bytes=lambda kwargs: 0,
)  # fmt: skip
