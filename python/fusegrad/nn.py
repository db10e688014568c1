"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

from .ops.cross_entropy import CrossEntropyLoss
from .ops.losses import BCEWithLogitsLoss, HuberLoss, JSDivLoss, KLDivLoss, L1Loss, MSELoss, SigmoidFocalLoss, SmoothL1Loss
from .ops.rms_norm import RMSNorm
from .ops.softmax import LogSoftmax, ScaledMaskedSoftmax, Softmax
from .ops.swiglu import SwiGLU

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "JSDivLoss",
    "KLDivLoss",
    "L1Loss",
    "LogSoftmax",
    "MSELoss",
    "RMSNorm",
    "ScaledMaskedSoftmax",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "Softmax",
    "SwiGLU",
]
