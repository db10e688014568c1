"""Loads the compiled part, or says in one sentence why it cannot be loaded and what to type."""

import torch

FIX = "reinstall it: pip install --no-build-isolation --force-reinstall --no-deps fusegrad's source directory"

try:
    from . import _build_info
except ImportError:
    raise ImportError(f"fusegrad was not built; {FIX}") from None

if torch.__version__ != _build_info.TORCH:
    raise ImportError(f"fusegrad was built for torch {_build_info.TORCH}, found torch {torch.__version__}; {FIX}")

try:
    from . import _C  # noqa: F401
except ImportError as error:
    built = f"torch {_build_info.TORCH}, CUDA {_build_info.CUDA}"
    raise ImportError(f"fusegrad's compiled part (built for {built}) does not load: {error}; {FIX}") from None
