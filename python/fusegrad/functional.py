"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.channel_norm import batch_norm, group_norm
from .ops.cross_entropy import cross_entropy
from .ops.layer_norm_2d import layer_norm_2d
from .ops.rms_norm import rms_norm
from .ops.swiglu import swiglu

__all__ = ["batch_norm", "cross_entropy", "group_norm", "layer_norm_2d", "rms_norm", "swiglu"]
