"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.cross_entropy import cross_entropy
from .ops.rms_norm import rms_norm
from .ops.swiglu import swiglu

__all__ = ["cross_entropy", "rms_norm", "swiglu"]
