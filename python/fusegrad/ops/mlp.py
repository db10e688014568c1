"""Multi-layer perceptrons of fused layers, which can recompute their hidden activations instead of keeping them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _transforms
from .._activations import number
from .gated import geglu, geglu_tanh, reglu, swiglu
from .linear import Linear

GATES = {"silu": swiglu, "gelu": geglu, "gelu_tanh": geglu_tanh, "relu": reglu}


class _Recomputing(torch.nn.Module):
    """forward() is that of `layers`; with `recompute` it keeps nothing but its input, and runs once more in the backward."""

    recompute: bool

    def forward(self, input: Tensor) -> Tensor:
        # Within a functorch level checkpoints are not to be had, nor of use: it differentiates within the call.
        if self.recompute and torch.is_grad_enabled() and (torch.compiler.is_compiling() or not _transforms.active()):
            # Our layers draw no random numbers. What somebody put around one may, and must draw the same ones again; a generator cannot
            # be asked for its state while a CUDA graph is captured.
            preserve = not (input.is_cuda and torch.cuda.is_current_stream_capturing())
            return checkpoint(self.layers, input, use_reentrant=False, preserve_rng_state=preserve)
        return self.layers(input)

    def layers(self, input: Tensor) -> Tensor:
        raise NotImplementedError


class MLP(_Recomputing):
    r"""Linear layers of the given sizes with an activation after each but the last, which has its own:

    .. math:: y = \mathrm{final}(W_n \, \mathrm{act}(\ldots \mathrm{act}(W_1 x + b_1) \ldots) + b_n)

    Args:
        sizes: the features of the input, of each hidden layer, of the output; at least two.
        activation, final_activation: see `bias_act`; None is the identity.
        recompute: save the input and no hidden activation; the backward computes them again.

    The input is `[*, sizes[0]]`, of the dtype of the weights: float32, float64, float16 or bfloat16, as `linear` takes them. The layers
    are `[0]`, `[1]`, ... and `state_dict` has `0.weight`, `0.bias`, ...

    Returns:
        `[*, sizes[-1]]` of the same dtype. Saved for backward: what each `linear` saves; with `recompute` the input, the parameters and
        the state of the random generator.

    Raises:
        ValueError: fewer than two sizes, an unknown activation. RuntimeError: an input that does not fit.

    Equivalent eager code::

        for layer in list(mlp.children())[:-1]:
            x = torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias))
        y = torch.nn.functional.linear(x, mlp[-1].weight, mlp[-1].bias)

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174 (`recompute`).
    """

    def __init__(self, sizes: Sequence[int], activation="relu", final_activation=None, bias=True, recompute=False, device=None, dtype=None):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes must be at least two, got {list(sizes)}")
        number("MLP", activation)
        self.sizes, self.recompute = tuple(sizes), recompute
        activations = [activation] * (len(sizes) - 2) + [final_activation]
        for i, act in enumerate(activations):
            self.add_module(str(i), Linear(sizes[i], sizes[i + 1], bias, device, dtype, activation=act))

    def __getitem__(self, i: int) -> Linear:
        return list(self.children())[i]

    def layers(self, input: Tensor) -> Tensor:
        for layer in self.children():
            input = layer(input)
        return input

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"


class GatedMLP(_Recomputing):
    r"""The feed-forward block of recent language models, its two input projections fused into one product:

    .. math:: y = W_{down} \, (\mathrm{act}(W_{gate} x) \cdot W_{up} x)

    Args:
        dim, hidden: features of input and output, and between.
        activation: silu (SwiGLU), gelu or gelu_tanh (GeGLU), relu (ReGLU).
        recompute: save the input and no hidden activation; the backward computes them again.

    The input is `[*, dim]`, of the dtype of the weights: float32, float64, float16 or bfloat16, as `linear` takes them.
    `gate_up.weight` is `[2 hidden, dim]`, the gate's rows first.

    Returns:
        `[*, dim]` of the same dtype. Saved for backward: the input, the packed projections `[*, 2 hidden]`, their gated product
        `[*, hidden]` and the parameters; with `recompute` the input, the parameters and
        the state of the random generator.

    Raises:
        ValueError: an unknown activation. RuntimeError: an input that does not fit.

    Equivalent eager code::

        gate, up = torch.nn.functional.linear(x, mlp.gate_up.weight).chunk(2, dim=-1)
        y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, mlp.down.weight)

    Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.
    """

    def __init__(self, dim: int, hidden: int, activation="silu", bias=False, recompute=False, device=None, dtype=None):
        super().__init__()
        if activation not in GATES:
            raise ValueError(f"GatedMLP: activation must be one of {', '.join(GATES)}, got {activation!r}")
        self.activation, self.recompute = activation, recompute
        self.gate_up = Linear(dim, 2 * hidden, bias, device, dtype)
        self.down = Linear(hidden, dim, bias, device, dtype)

    def layers(self, input: Tensor) -> Tensor:
        return self.down(GATES[self.activation](self.gate_up(input)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute}"
