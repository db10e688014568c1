"""Dropout, alone and with a bias before and a residual after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import Function, differentiable
from .._op import Op, Sample, check_tensor, compiled, overridable, real, wide

dropout_fwd = compiled("dropout_fwd")
dropout_bwd = compiled("dropout_bwd")
dropout_mask = compiled("dropout_mask")


def draw_seed(x: Tensor) -> Tensor:
    """What a mask is made of. A tensor that the kernel reads: nobody waits for a device, and a CUDA graph draws anew at each replay."""
    return torch.randint(2**63 - 1, (), device=x.device)


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """What dropout makes of x, which has the dtype to compute in."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # torch's own bits: ours would be of the size at hand, if a graph had them
        return F.dropout(x, p)
    return x * (dropout_mask(seed, x.shape, p).to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0))


def dropout_reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return dropped(wide(x), seed, p).to(x.dtype)


def bias_dropout_add_reference(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, p: float) -> Tensor:
    biased = wide(x) if bias is None else wide(x) + wide(bias)
    return (wide(residual) + (biased if p == 0 else dropped(biased, seed, p))).to(x.dtype)


@torch.library.register_fake("fusegrad::dropout_mask")
def _(seed, sizes, p):
    return seed.new_empty(sizes, dtype=torch.bool)


@torch.library.register_vmap("fusegrad::dropout_mask")
def _(info, in_dims, seed, sizes, p):
    return torch.stack([dropout_mask(s, sizes, p) for s in seed.unbind(in_dims[0])]), 0


@torch.library.register_fake("fusegrad::dropout_fwd")
def _(x, bias, residual, seed, p):
    return torch.empty_like(x) if residual is None else x.new_empty(x.shape)


@torch.library.register_fake("fusegrad::dropout_bwd")
def _(dy, bias, seed, p, needed):
    if not needed[1]:
        return torch.empty_like(dy) if needed[0] else None, None
    return dy.new_empty(dy.shape) if needed[0] else None, torch.empty_like(bias)


def _inputs(ctx) -> tuple:
    """Of the forward, with zeros for the ones of x's shape: the ops are linear in them, so that no derivative depends on them."""
    *bias, seed = ctx.saved_tensors
    zeros = seed.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)
    return (zeros, *bias, zeros, seed) if bias else (zeros, seed)


class DropoutFn(Function):
    op = "dropout"
    reference = staticmethod(dropout_reference)

    @staticmethod
    def forward(x, seed, p):
        return dropout_fwd(x, None, None, seed, p)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, seed, *ctx.options = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed)

    @differentiable(_inputs)
    def backward(ctx, dy):
        dx = None if dy is None else dropout_bwd(dy, None, *ctx.saved_tensors, *ctx.options, (ctx.needs_input_grad[0], False))[0]
        return dx, None, None


class BiasDropoutAddFn(Function):
    op = "bias_dropout_add"
    reference = staticmethod(bias_dropout_add_reference)

    @staticmethod
    def forward(x, bias, residual, seed, p):
        return dropout_fwd(x, bias, residual, seed, p)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, bias, _, seed, *ctx.options = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(bias, seed)

    @differentiable(_inputs)
    def backward(ctx, dy):
        dx = dbias = None
        if dy is not None and any(ctx.needs_input_grad[:2]):
            dx, dbias = dropout_bwd(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:2])
        return dx, dbias, dy if ctx.needs_input_grad[2] else None, None, None


def probability(op: str, p: float) -> float:
    p = real(op, "p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: p must be in [0, 1], got {p}")
    return p


@overridable
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    r"""Sets each element to 0 with probability p and scales the others so that the expectation stays:

    .. math:: y_i = x_i\, m_i / (1 - p), \quad m_i \sim \mathrm{Bernoulli}(1 - p)

    Drop-in for `torch.nn.functional.dropout`, except that the same seed drops other elements: m is a function of a seed that is drawn
    from torch's generator (one number a call) and of the element's index, so that it is the same for any layout, device and number of
    threads. It is recomputed in the backward and not stored.

    Args:
        input: `[*]`, float32, float64, float16 or bfloat16, any layout.
        p: the probability to drop an element. 0 drops none and 1 all, exactly; others are rounded to a multiple of 2^-31.
        training: if False, the input itself is returned.
        inplace: write the result into `input`, which is returned, as torch does. The kernel does not save memory by it.

    Returns:
        The shape and dtype of `input`; `input` itself, as torch, where there is nothing to drop. As in torch a dropped NaN or infinity
        is NaN, being multiplied by 0. Saved for backward: the seed, 8 bytes.

    Raises:
        ValueError: p outside [0, 1]. TypeError: an integer input, where something is dropped. RuntimeError: a tensor that is not
        dense.

    Equivalent eager code::

        seed = torch.randint(2**63 - 1, (), device=input.device)
        kept = torch.ops.fusegrad.dropout_mask(seed, input.shape, p)
        y = (input.float() * kept * (1 / (1 - p))).to(input.dtype)

    Source: Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014, JMLR 15.
    """
    check_tensor("dropout", "input", input)
    p = probability("dropout", p)
    if p == 0 or not training:
        return input
    if not (input.is_floating_point() or input.is_complex()):
        raise TypeError(f"dropout: input must be a floating-point tensor, got {input.dtype}")
    y = DropoutFn.call((input, draw_seed(input)), p)
    return input.copy_(y) if inplace else y


@overridable
def bias_dropout_add(input: Tensor, bias: Tensor | None, residual: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    r"""The end of a transformer's sublayer, in one pass each way: bias, dropout, residual.

    .. math:: y = \mathrm{residual} + \mathrm{dropout}(\mathrm{input} + \mathrm{bias})

    Args:
        input: `[*, n]`, float32, float64, float16 or bfloat16, any layout.
        bias: `[n]`, of the input's dtype, or float32 with a 16-bit input; or None.
        residual: the shape and dtype of `input`.
        p: the probability to drop an element, as in `dropout`.
        training: if False, nothing is dropped.

    Returns:
        The shape and dtype of `input`, contiguous, computed in float32 (float64 for float64). Saved for backward: the bias and the
        seed of the dropout (8 bytes); no mask.

    Raises:
        ValueError: p outside [0, 1]. TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit,
        tensors on two devices, a tensor that is not dense.

    Equivalent eager code::

        seed = torch.randint(2**63 - 1, (), device=input.device)
        kept = torch.ops.fusegrad.dropout_mask(seed, input.shape, p)
        biased = input.float() if bias is None else input.float() + bias.float()
        y = (residual.float() + biased * kept * (1 / (1 - p))).to(input.dtype)

    Source: Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014, JMLR 15.
    """
    check_tensor("bias_dropout_add", "input", input)
    check_tensor("bias_dropout_add", "residual", residual)
    p = probability("bias_dropout_add", p)
    p = p if training else 0.0
    if input.dim() == 0:
        raise RuntimeError("bias_dropout_add: input must have at least one dimension, got a scalar")
    if residual.shape != input.shape or residual.dtype != input.dtype:
        error = RuntimeError if residual.dtype == input.dtype else TypeError
        expected, fact = f"{input.dtype} {list(input.shape)}", f"{residual.dtype} {list(residual.shape)}"
        raise error(f"bias_dropout_add: residual must have the dtype and shape of input ({expected}), got {fact}")
    if bias is not None:
        check_tensor("bias_dropout_add", "bias", bias)
        if bias.shape != input.shape[-1:]:
            raise RuntimeError(f"bias_dropout_add: bias must have shape {list(input.shape[-1:])}, got {list(bias.shape)}")
    seed = draw_seed(input) if p > 0 else input.new_zeros((), dtype=torch.int64)  # without a dropout no number is drawn
    return BiasDropoutAddFn.call((input, bias, residual, seed), p)


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout` whose mask is never stored. See `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)


class BiasDropoutAdd(torch.nn.Module):
    """`residual + dropout(input + bias)` with a bias of its own (zeros at first; None with `bias=False`). See `bias_dropout_add`."""

    def __init__(self, num_features: int, p: float = 0.5, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.num_features, self.p = num_features, probability("BiasDropoutAdd", p)
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_add(input, self.bias, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"{self.num_features}, p={self.p}, bias={self.bias is not None}"


def _dropout_samples(make):
    yield Sample("plain", dict(input=make(5, 33)))
    yield Sample("tenth", dict(input=make(4, 3, 70), p=0.1, training=True))
    yield Sample("most", dict(input=make(6, 40), p=0.9, inplace=False))
    yield Sample("all", dict(input=make(3, 9), p=1.0, training=True, inplace=False))
    yield Sample("half", dict(input=make(129), p=0.5))
    yield Sample("row_strided", dict(input=make(6, 40, layout="row_strided"), p=0.3))
    yield Sample("column_strided", dict(input=make(5, 24, layout="column_strided"), p=0.2))
    yield Sample("transposed", dict(input=make(7, 19, layout="transposed"), p=0.25))
    yield Sample("image", dict(input=make(2, 5, 4, 3, layout="channels_last"), p=0.4))
    yield Sample("packed", dict(input=make.chunks(3, 2, 4, 8)[1], p=0.1))
    yield Sample("scalar", dict(input=make(), p=0.5))
    yield Sample("no_rows", dict(input=make(0, 8), p=0.5))
    yield Sample("long", dict(input=make(2, 9001), p=0.1))


def _bias_dropout_add_samples(make):
    def sample(name, *shape, layout="contiguous", bias=True, **options):
        x, residual = make(*shape, layout=layout), make(*shape)
        return Sample(name, dict(input=x, bias=make.param(shape[-1]) if bias else None, residual=residual, **options))

    yield sample("plain", 5, 33)
    yield sample("tenth", 4, 3, 70, p=0.1, training=True)
    yield sample("no_bias", 6, 40, bias=False, p=0.3)
    yield sample("no_bias_strided", 3, 4, 16, layout="packed_heads", bias=False)
    yield sample("evaluation", 5, 24, p=0.1, training=False)
    yield sample("evaluation_no_bias", 4, 9, p=0.1, bias=False, training=False)
    yield sample("nothing_dropped", 5, 24, p=0.0)
    yield sample("all_dropped", 5, 24, p=1.0)
    yield sample("one_row", 129, p=0.25)
    yield sample("one_column", 7, 1, p=0.5)
    yield sample("row_strided", 6, 40, layout="row_strided", p=0.2)
    yield sample("column_strided", 6, 40, layout="column_strided", p=0.2)
    yield sample("transposed", 9, 35, layout="transposed", p=0.5)
    yield sample("channels_last", 2, 5, 3, 8, layout="channels_last", p=0.1)
    yield sample("no_rows", 0, 8)
    yield sample("long", 2, 9001, p=0.1)


DROPOUT = Op(
    name="dropout",
    fn=DropoutFn,
    functional=dropout,
    reference=dropout_reference,
    samples=_dropout_samples,
    module=Dropout,
    torch=torch.nn.functional.dropout,
    random=True,
    saved_bytes=lambda kwargs: 8,
    shards=lambda *_: ((), {}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), p=0.1),
)

BIAS_DROPOUT_ADD = Op(
    name="bias_dropout_add",
    fn=BiasDropoutAddFn,
    functional=bias_dropout_add,
    reference=bias_dropout_add_reference,
    samples=_bias_dropout_add_samples,
    module=BiasDropoutAdd,
    random=True,
    saved_bytes=lambda kwargs: 8 + (0 if kwargs["bias"] is None else kwargs["bias"].nbytes),
    shards=lambda *_: ((), {1: (-1,)}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), bias=make.param(cols), residual=make(rows, cols), p=0.1),
)
