"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.cross_entropy import cross_entropy
from .ops.losses import (
    binary_cross_entropy_with_logits,
    huber_loss,
    js_div,
    kl_div,
    l1_loss,
    mse_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from .ops.rms_norm import rms_norm
from .ops.softmax import log_softmax, scaled_masked_softmax, softmax
from .ops.swiglu import swiglu

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "js_div",
    "kl_div",
    "l1_loss",
    "log_softmax",
    "mse_loss",
    "rms_norm",
    "scaled_masked_softmax",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax",
    "swiglu",
]
