"""The modules. Where `torch.nn` has one of the same name, ours is a subclass of it: same constructor, parameters and state dict."""

from .ops.add_norm import AddLayerNorm, AddRMSNorm
from .ops.cross_entropy import CrossEntropyLoss

__all__ = ["AddLayerNorm", "AddRMSNorm", "BiasDropoutAdd", "CrossEntropyLoss", "Dropout", "DyT", "LayerNorm", "RMSNorm", "SwiGLU"]
