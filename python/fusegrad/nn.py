"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

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
