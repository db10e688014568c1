"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

import functools

from torch import fx

from .ops.add_norm import AddLayerNorm, AddRMSNorm
from .ops.bias_act import BiasAct
from .ops.channel_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm
from .ops.cross_entropy import CrossEntropyLoss
from .ops.dropout import BiasDropoutAdd, Dropout
from .ops.dyt import DyT
from .ops.gated import GLU, GeGLU, GeGLUTanh, ReGLU, SwiGLU
from .ops.layer_norm import LayerNorm
from .ops.layer_norm_2d import LayerNorm2d
from .ops.linear import Linear
from .ops.linear_cross_entropy import LinearCrossEntropyLoss
from .ops.losses import BCEWithLogitsLoss, HuberLoss, JSDivLoss, KLDivLoss, L1Loss, MSELoss, SigmoidFocalLoss, SmoothL1Loss
from .ops.mlp import MLP, GatedMLP
from .ops.pointwise import Cube, Exp, GradientReversal, Scale
from .ops.rms_norm import RMSNorm
from .ops.rotary import RotaryEmbedding
from .ops.softmax import LogSoftmax, ScaledMaskedSoftmax, Softmax

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BiasAct",
    "BiasDropoutAdd",
    "CrossEntropyLoss",
    "Cube",
    "Dropout",
    "DyT",
    "Exp",
    "GLU",
    "GatedMLP",
    "GeGLU",
    "GeGLUTanh",
    "GradientReversal",
    "GroupNorm",
    "HuberLoss",
    "JSDivLoss",
    "KLDivLoss",
    "L1Loss",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MLP",
    "MSELoss",
    "RMSNorm",
    "ReGLU",
    "RotaryEmbedding",
    "Scale",
    "ScaledMaskedSoftmax",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "Softmax",
    "SwiGLU",
]


# torch.fx takes a module of torch.nn as one node, by the name of its class's module, and goes into all others, where it would keep sizes
# and `training` as they are while it traces. There is no other place to tell it that these are such modules.
_is_leaf_module = fx.Tracer.is_leaf_module


@functools.wraps(_is_leaf_module)
def _with_ours(self, m, module_qualified_name):
    forward_of = next(c for c in type(m).__mro__ if "forward" in vars(c))  # not that of a subclass with a forward of its own
    return forward_of.__module__.startswith(f"{__package__}.ops.") or _is_leaf_module(self, m, module_qualified_name)


fx.Tracer.is_leaf_module = _with_ours
