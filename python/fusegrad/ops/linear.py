"""Linear, with an activation that shares a pass with the bias. The matrix products are torch's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .._activations import activate, number, torchs
from .._autograd import Function, differentiable, is_sharded
from .._op import SHAPES, Op, Sample, autocast, check_tensor, compiled, expands, fall_back, overridable, wide
from .bias_act import bias_act, bias_act_bwd, bias_act_fwd

linear_product = compiled("linear_product")

_IDENTITY = number("linear", None)
_AS_IS = (1.0, 0.01)  # the scale and the slope of bias_act


def linear_reference(x: Tensor, w: Tensor, b: Tensor | None, act: int) -> Tensor:
    product = F.linear(wide(x), wide(w))
    return activate(product if b is None else product + wide(b), act).to(x.dtype)


@torch.library.register_fake("fusegrad::linear_product")
def _(x, w, b):
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def product_flops(x, w) -> int:
    """Of shapes."""
    return 2 * math.prod(x) * w[0]


@register_flop_formula(torch.ops.fusegrad.linear_product)
def _(x, w, b, out_shape):
    return product_flops(x, w)


def _product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w^T + b, which torch.compile shall see as what it is."""
    return F.linear(x, w, b) if torch.compiler.is_compiling() else linear_product(x, w, b)


class LinearFn(Function):
    op = "linear"
    reference = staticmethod(linear_reference)
    params = (1, 2)

    @staticmethod
    def forward(x, w, b, act):
        if act == _IDENTITY:
            return _product(x, w, b), None
        product = _product(x, w)
        return bias_act_fwd(product, b, act, *_AS_IS, product.dim() - 1), product

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, w, b, *ctx.options = inputs
        _, product = outputs
        ctx.set_materialize_grads(False)
        if product is not None:
            ctx.mark_non_differentiable(product)
        ctx.save_for_backward(x, w, b, product)

    @differentiable(lambda ctx: ctx.saved_tensors[:3])
    def backward(ctx, dy, _):
        return _backward(ctx, (), dy)

    @classmethod
    def of_samples(cls, ctx, samples, dy, _):
        return _backward(ctx, samples, dy)


def _backward(ctx, samples, dy):
    """With samples as first dimensions of all rows, the gradients of weight and bias have them too: batched products, and sums."""
    dx = dw = db = None
    if dy is not None:
        x, w, b, product = ctx.saved_tensors
        (act,) = ctx.options
        of_x, of_w, of_b = ctx.needs_input_grad[:3]
        dz, of_all = dy, of_b and not samples
        if product is not None:
            dz, db = bias_act_bwd(dy, product, b, act, *_AS_IS, dy.dim() - 1, (of_x or of_w or (of_b and not of_all), of_all))
        elif of_all:
            _, db = bias_act_bwd(dy, dy, b, act, *_AS_IS, dy.dim() - 1, (False, True))
        if of_x:
            dx = _product(dz, w.t())
        if of_w or (of_b and samples):
            rows = math.prod(x.shape[len(samples) : -1])
            dz = dz.reshape(*samples, rows, w.shape[0])
        if of_w:
            dzt, xt = dz.mT, x.reshape(*samples, rows, w.shape[1]).mT
            dw = dzt @ xt.mT if samples else _product(dzt, xt)
        if of_b and samples:
            db = dz.sum(-2)
    return dx, dw, db, None


@overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    r"""Linear map, and an activation of it that shares one pass with the bias in forward, and its gradient with that of the bias:

    .. math:: y = \mathrm{act}(x W^\top + b)

    Drop-in for `torch.nn.functional.linear`.

    Args:
        input: `[*, in]`, float32, float64, float16 or bfloat16, any layout.
        weight: `[out, in]`, of the input's dtype: as in torch float32 parameters take no 16-bit input outside autocast.
            `[in]` and a bias `[]` give `[*]`.
        bias: `[out]`, of the input's dtype, or None. Another one that broadcasts to the result goes through
            `torch.nn.functional.linear`.
        activation: None or one of those of `bias_act`.

    Returns:
        `[*, out]` of the input's dtype (under autocast: of the autocast dtype, as torch). Saved for backward: input and weight; with an
        activation also the bias and the product without it.

    Raises:
        TypeError: two dtypes. RuntimeError: a shape that does not fit, two devices, a tensor that is not dense. ValueError: an unknown
        activation.

    Equivalent eager code::

        y = torch.nn.functional.gelu(torch.nn.functional.linear(input, weight, bias))  # for activation="gelu"

    Source: Thakkar et al. 2023, CUTLASS, https://github.com/NVIDIA/cutlass (an activation in a product's epilogue).
    """
    check_tensor("linear", "input", input)
    check_tensor("linear", "weight", weight)
    if bias is not None:
        check_tensor("linear", "bias", bias)
    act = number("linear", activation)
    if any([t is not None and is_sharded(t) for t in (input, weight, bias)]):
        from .. import _sharded

        input, weight, bias = _sharded.alike("linear", (input, weight, bias))
    if autocast(input) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = (None if t is None else t.to(dtype) for t in (input, weight, bias))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != input.dtype:
            raise TypeError(f"linear: {name} must be {input.dtype}, as input is, got {t.dtype}")
        if t is not None and t.device != input.device:
            raise RuntimeError(f"linear: {name} must be on {input.device}, where input is, got a tensor on {t.device}")
    if weight.dim() not in (2, 1) or input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        expected = f"[out, in] or [in] for input [*, in] ({list(input.shape)})"
        raise RuntimeError(f"linear: weight must have shape {expected}, got {list(weight.shape)}")
    if weight.dim() == 1 and (bias is None or bias.dim() == 0):
        return linear(input, weight[None], None if bias is None else bias[None], activation=activation).squeeze(-1)
    if bias is not None and bias.shape != weight.shape[:1]:
        if weight.dim() == 1 or not expands(bias, input.shape[:-1] + weight.shape[:-1]):
            raise RuntimeError(f"linear: bias must have shape {list(weight.shape[:-1])}, got {list(bias.shape)}")
        fall_back("linear", "bias broadcasts", input)
        return activate(F.linear(input, weight, bias), act)
    if is_sharded(input):  # torch knows which products need no communication
        rows = input if input.dim() > 1 else input.unsqueeze(0)  # of one row torch's product has a wrong shape
        y = F.linear(rows, weight, bias) if act == _IDENTITY else bias_act(F.linear(rows, weight), bias, activation)
        return y if input.dim() > 1 else y.squeeze(0)
    return LinearFn.call((input, weight, bias), act, outputs=1)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with an activation in the same pass as the bias; parameters and state dict are torch's, and as there
    16-bit input takes 16-bit parameters, or autocast. See `linear`."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, activation=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        number("Linear", activation)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def _samples(make):
    def sample(name, x, out, bias=True, activation=None, **kwargs):
        weight = make(out, x.shape[-1], scale=x.shape[-1] ** -0.5, **kwargs)
        options = {} if activation is None else dict(activation=activation)
        return Sample(name, dict(input=x, weight=weight, bias=make(out) if bias else None) | options)

    yield sample("gelu", make(5, 33), 7, activation="gelu")
    yield sample("plain", make(5, 33), 7)
    yield sample("no_bias", make(3, 4, 16), 9, bias=False)
    yield sample("relu_no_bias", make(4, 17), 5, bias=False, activation="relu")
    yield sample("silu", make(2, 3, 24), 40, activation="silu")
    yield sample("tanh", make(6, 20, layout="transposed"), 11, activation="tanh")
    yield sample("sigmoid", make(6, 20, layout="column_strided"), 11, activation="sigmoid")
    yield sample("row_strided", make(6, 20, layout="row_strided"), 11)
    yield sample("weight_transposed", make(4, 12), 9, activation="leaky_relu", layout="transposed")
    yield sample("expanded", make(6, 22, layout="expanded"), 8, activation="softplus")
    yield sample("packed_heads", make(2, 3, 5, 12, layout="packed_heads"), 10, activation="gelu_tanh")
    yield sample("one_row", make(50), 6, activation="mish")
    yield sample("one_out", make(7, 30), 1, activation="elu")
    yield sample("one_in", make(7, 1), 4, activation="square")
    yield sample("no_rows", make(0, 8), 5, activation="gelu")
    yield sample("wide", make(3, 700), 500, activation="hardswish")


def _saved_bytes(kwargs):
    x, w, b = kwargs["input"], kwargs["weight"], kwargs["bias"]
    if kwargs.get("activation") is None:
        return x.nbytes + w.nbytes + (0 if b is None else b.nbytes)
    return x.nbytes + w.nbytes + (0 if b is None else b.nbytes) + x[..., 0].numel() * len(w) * x.itemsize


def _bench(make, rows, cols):
    out = max(1, min(cols, 2**22 // cols))
    return dict(input=make(rows, cols), weight=make(out, cols, scale=cols**-0.5), bias=make(out), activation="gelu")


LINEAR = Op(
    name="linear",
    fn=LinearFn,
    functional=linear,
    reference=linear_reference,
    samples=_samples,
    module=Linear,
    torch=lambda input, weight, bias, activation=None: torchs(F.linear(input, weight, bias), activation),
    permutes=lambda kwargs: {"input": -1, "weight": -1, "output": None},
    saved_bytes=_saved_bytes,
    bench=_bench,
    shapes=(*SHAPES[:5], (512, 512), (2048, 1024), (4096, 256), (65536, 256)),  # layers have no more features
    by_reference="a bias that broadcasts",
    kernels=("bias_act_fwd", "bias_act_bwd"),
    layout_bits=False,
    gemm="torch",
)
