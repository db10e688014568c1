"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.bias_act import bias_act
from .ops.cross_entropy import cross_entropy
from .ops.dropout import bias_dropout_add, dropout
from .ops.gated import geglu, geglu_tanh, glu, reglu, swiglu
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy, linear_token_log_probs
from .ops.pointwise import cube, exp, grad_reverse, scale
from .ops.rms_norm import rms_norm
from .ops.rotary import qk_norm_rope, rotary_embedding
from .ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy

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
    "linear_cross_entropy",
    "linear_token_log_probs",
    "qk_norm_rope",
    "reglu",
    "rms_norm",
    "rotary_embedding",
    "scale",
    "swiglu",
    "vocab_parallel_cross_entropy",
]
