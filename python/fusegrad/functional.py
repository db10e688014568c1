"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.add_norm import add_layer_norm, add_rms_norm
from .ops.cross_entropy import cross_entropy

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "bias_dropout_add",
    "cross_entropy",
    "dropout",
    "dyt",
    "layer_norm",
    "norm",
    "normalize",
    "rms_norm",
    "swiglu",
]
