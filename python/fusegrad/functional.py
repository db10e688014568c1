"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.add_norm import add_layer_norm, add_rms_norm
from .ops.cross_entropy import cross_entropy
from .ops.dropout import bias_dropout_add, dropout
from .ops.dyt import dyt
from .ops.l2_norm import norm, normalize
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .ops.swiglu import swiglu

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
