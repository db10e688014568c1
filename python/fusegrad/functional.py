"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.bias_act import bias_act
from .ops.cross_entropy import cross_entropy
from .ops.dropout import bias_dropout_add, dropout
from .ops.gated import geglu, geglu_tanh, glu, reglu, swiglu
from .ops.linear import linear
from .ops.pointwise import cube, exp, grad_reverse, scale
from .ops.rms_norm import rms_norm

__all__ = [
    "bias_act",
    "bias_dropout_add",
    "cross_entropy",
    "cube",
    "dropout",
    "exp",
    "geglu",
    "geglu_tanh",
    "glu",
    "grad_reverse",
    "linear",
    "reglu",
    "rms_norm",
    "scale",
    "swiglu",
]
