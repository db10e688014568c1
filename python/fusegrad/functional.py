"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.add_norm import add_layer_norm, add_rms_norm
from .ops.bias_act import bias_act
from .ops.channel_norm import batch_norm, group_norm
from .ops.cross_entropy import cross_entropy
from .ops.dropout import bias_dropout_add, dropout
from .ops.dyt import dyt
from .ops.gated import geglu, geglu_tanh, glu, reglu, swiglu
from .ops.l2_norm import norm, normalize
from .ops.layer_norm import layer_norm
from .ops.layer_norm_2d import layer_norm_2d
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy, linear_token_log_probs
from .ops.losses import binary_cross_entropy_with_logits, huber_loss, js_div, kl_div, l1_loss, mse_loss, sigmoid_focal_loss, smooth_l1_loss
from .ops.pointwise import cube, exp, grad_reverse, scale
from .ops.rms_norm import rms_norm
from .ops.rotary import qk_norm_rope, rotary_embedding
from .ops.softmax import log_softmax, scaled_masked_softmax, softmax
from .ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "bias_act",
    "bias_dropout_add",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "cube",
    "dropout",
    "dyt",
    "exp",
    "geglu",
    "geglu_tanh",
    "glu",
    "grad_reverse",
    "group_norm",
    "huber_loss",
    "js_div",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "layer_norm_2d",
    "linear",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "log_softmax",
    "mse_loss",
    "norm",
    "normalize",
    "qk_norm_rope",
    "reglu",
    "rms_norm",
    "rotary_embedding",
    "scale",
    "scaled_masked_softmax",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax",
    "swiglu",
    "vocab_parallel_cross_entropy",
]
