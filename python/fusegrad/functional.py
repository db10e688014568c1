"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.cross_entropy import cross_entropy
from .ops.dropout import bias_dropout_add, dropout
from .ops.rms_norm import rms_norm
from .ops.rotary import qk_norm_rope, rotary_embedding
from .ops.swiglu import swiglu

__all__ = ["bias_dropout_add", "cross_entropy", "dropout", "qk_norm_rope", "rms_norm", "rotary_embedding", "swiglu"]
