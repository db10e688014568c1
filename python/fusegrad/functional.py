"""The functionals. Where `torch.nn.functional` has one of the same name, the arguments are the same, in the same order."""

from .ops.cross_entropy import cross_entropy
from .ops.linear_cross_entropy import linear_cross_entropy, linear_token_log_probs
from .ops.rms_norm import rms_norm
from .ops.swiglu import swiglu
from .ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_token_log_probs", "rms_norm", "swiglu", "vocab_parallel_cross_entropy"]
