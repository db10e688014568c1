"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

from .ops.channel_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm
from .ops.cross_entropy import CrossEntropyLoss
from .ops.layer_norm_2d import LayerNorm2d
from .ops.rms_norm import RMSNorm
from .ops.swiglu import SwiGLU

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "CrossEntropyLoss", "GroupNorm", "LayerNorm2d", "RMSNorm", "SwiGLU"]
