"""What torch.fx is told of our modules when the package is imported.

It takes a module of torch.nn as one node, by the name of its class's module, and goes into all others, where it would keep sizes and
`training` as they are while it traces. There is no other place to tell it that ours are such modules."""

from __future__ import annotations

import functools

from torch import fx

_is_leaf_module = fx.Tracer.is_leaf_module


@functools.wraps(_is_leaf_module)
def _with_ours(self, m, module_qualified_name):
    forward_of = next(c for c in type(m).__mro__ if "forward" in vars(c))  # not that of a subclass with a forward of its own
    return forward_of.__module__.startswith(f"{__package__}.ops.") or _is_leaf_module(self, m, module_qualified_name)


fx.Tracer.is_leaf_module = _with_ours
