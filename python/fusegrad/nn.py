"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

from .ops.add_norm import AddLayerNorm, AddRMSNorm
from .ops.cross_entropy import CrossEntropyLoss
from .ops.dropout import BiasDropoutAdd, Dropout
from .ops.dyt import DyT
from .ops.layer_norm import LayerNorm
from .ops.rms_norm import RMSNorm
from .ops.swiglu import SwiGLU

__all__ = ["AddLayerNorm", "AddRMSNorm", "BiasDropoutAdd", "CrossEntropyLoss", "Dropout", "DyT", "LayerNorm", "RMSNorm", "SwiGLU"]
