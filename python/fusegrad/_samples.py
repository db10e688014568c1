"""Random arguments for the samples of the table, in any dtype and layout. Tests and benchmarks draw from it."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "row_strided", "column_strided", "transposed", "expanded", "offset", "channels_last", "packed_heads")


def lay_out(t: Tensor, layout: str) -> Tensor:
    """A tensor of t's shape and values in that layout (of t's first entry, if expanded); t itself where it has too few dimensions."""
    least = {"contiguous": 0, "transposed": 2, "expanded": 2, "channels_last": 4, "packed_heads": 2}.get(layout, 1)
    if t.dim() < least or (layout == "channels_last" and t.dim() != 4):
        return t
    *rows, cols = t.shape if t.dim() else (1,)
    if layout == "contiguous":
        return t.contiguous()
    if layout == "row_strided":
        return t.new_empty(*rows, cols + 5)[..., 3 : cols + 3].copy_(t)
    if layout == "column_strided":
        return t.new_empty(*rows, 2 * cols)[..., ::2].copy_(t)
    if layout == "transposed":
        return t.new_empty(*rows[:-1], cols, rows[-1]).transpose(-1, -2).copy_(t)
    if layout == "expanded":
        return t[:1].clone().expand_as(t)
    if layout == "offset":
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    if layout == "channels_last":
        return t.to(memory_format=torch.channels_last)
    if layout == "packed_heads":
        return t.new_empty(*rows[:-1], 3, rows[-1], cols)[..., 1, :, :].copy_(t)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


class Make:
    """Draws tensors: `make(*shape)` for rows, `make.param(*shape)` for parameters, `make.labels(*shape, classes=C)`."""

    def __init__(self, dtype=torch.float32, param_dtype=None, device="cpu", seed=0):
        self.dtype, self.param_dtype, self.device = dtype, param_dtype or dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def _normal(self, shape, dtype, layout, scale=1.0, shift=0.0) -> Tensor:
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift
        return lay_out(t.to(self.device, dtype), layout)

    def __call__(self, *shape: int, layout="contiguous", scale=1.0) -> Tensor:
        return self._normal(shape, self.dtype, layout, scale)

    def param(self, *shape: int, layout="contiguous", positive=False) -> Tensor:
        t = self._normal(shape, self.param_dtype, layout, 0.3, 1.0)
        return t.abs_() if positive else t

    def chunks(self, n: int, *shape: int) -> tuple[Tensor, ...]:
        """The n parts of one packed projection: slices that share memory with their neighbours."""
        return self(*shape[:-1], n * shape[-1]).chunk(n, -1)

    def labels(self, *shape: int, classes: int, ignore: int | str | None = None) -> Tensor:
        """Class numbers; every third one is `ignore`, or all are -100 if ignore is "all"."""
        t = torch.randint(classes, shape, generator=self.generator)
        if ignore == "all":
            t.fill_(-100)
        elif ignore is not None:
            t.view(-1)[::3] = ignore
        return t.to(self.device)

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self.dtype, device=self.device)
