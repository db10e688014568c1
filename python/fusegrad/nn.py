"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

from .ops.cross_entropy import CrossEntropyLoss
from .ops.linear_cross_entropy import LinearCrossEntropyLoss
from .ops.rms_norm import RMSNorm
from .ops.swiglu import SwiGLU

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "RMSNorm", "SwiGLU"]
