"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

from .ops.cross_entropy import CrossEntropyLoss
from .ops.dropout import BiasDropoutAdd, Dropout
from .ops.rms_norm import RMSNorm
from .ops.rotary import RotaryEmbedding
from .ops.swiglu import SwiGLU

__all__ = ["BiasDropoutAdd", "CrossEntropyLoss", "Dropout", "RMSNorm", "RotaryEmbedding", "SwiGLU"]
