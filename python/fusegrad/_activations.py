"""The activations by name, in the order of their numbers in csrc/ops/activation.h: what references apply to an element.

Two are spelled out, as the backwards of F.silu and F.mish have no forward mode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "sigmoid": lambda x, slope: torch.sigmoid(x),
    "tanh": lambda x, slope: torch.tanh(x),
    "exp": lambda x, slope: torch.exp(x),
    "square": lambda x, slope: x * x,
    "cube": lambda x, slope: x * x * x,
    "squared_relu": lambda x, slope: F.relu(x).square(),
    "gelu": lambda x, slope: F.gelu(x),
    "gelu_tanh": lambda x, slope: F.gelu(x, approximate="tanh"),
    "silu": lambda x, slope: x * torch.sigmoid(x),
    "softplus": lambda x, slope: F.softplus(x),
    "elu": lambda x, slope: F.elu(x),
    "mish": lambda x, slope: x * torch.tanh(F.softplus(x)),
    "hardswish": lambda x, slope: F.hardswish(x),
}
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_FUNCTIONS = list(ACTIVATIONS.values())


def number(op: str, activation: str | None) -> int:
    """What a kernel calls the activation; None is the identity."""
    try:
        return _NUMBERS["identity" if activation is None else activation]
    except (KeyError, TypeError):
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}") from None


def activate(x: Tensor, number: int, slope: float = 0.01) -> Tensor:
    return _FUNCTIONS[number](x, slope)


def torchs(x: Tensor, activation: str | None) -> Tensor:
    """As users write it, also those that are spelled out above."""
    return getattr(F, activation)(x) if activation in ("silu", "mish") else activate(x, number("activation", activation))
