"""Fused training layers for PyTorch: forward and backward kernels for CPU and CUDA that keep the whole autograd contract."""

from . import _load  # noqa: F401, I001  before anything that needs the compiled part: says what is wrong if it cannot be had
from . import _fx, functional, nn  # noqa: F401
from ._fuse import fuse, unfuse
from ._op import empty_cache, reset_stats, stats, strict, use_reference, why_not

__version__ = "0.1.0"
__all__ = ["empty_cache", "functional", "fuse", "nn", "reset_stats", "stats", "strict", "unfuse", "use_reference", "why_not"]
