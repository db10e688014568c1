"""Ops of DTensors: each process runs the kernel on its part, by what the op's row says of the dimensions that may be split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


class _Local(torch.autograd.Function):
    """This process's part. torch's to_local and from_local lose the derivatives beyond the first where a gradient has to be placed
    anew; each of these two is the other's backward, and loses none."""

    @staticmethod
    def forward(ctx, t, placements_of_gradient):
        ctx.set_materialize_grads(False)
        ctx.whole = t.device_mesh, placements_of_gradient, t.shape, t.stride()
        local = t.to_local()
        local = local.wait() if hasattr(local, "wait") else local  # the result of a collective that may be under way
        return local.view_as(local)

    @staticmethod
    def backward(ctx, g):
        return None if g is None else _Whole.apply(g, *ctx.whole), None


class _Whole(torch.autograd.Function):
    """The DTensor of which every process has a part."""

    @staticmethod
    def forward(ctx, local, mesh, placements, shape, stride):
        ctx.set_materialize_grads(False)
        ctx.placed = mesh, placements
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx, g):
        if g is not None:
            mesh, placements = ctx.placed
            g = _placed(g, mesh, [Replicate() if p.is_partial() else p for p in placements])  # each summand has the sum's gradient
            g = _Local.apply(g, placements)
        return g, None, None, None, None


def _placed(t: DTensor, mesh: DeviceMesh, placements: Sequence) -> DTensor:
    return t if list(t.placements) == list(placements) else t.redistribute(mesh, placements)


@torch.compiler.disable
def call(row, tensors: Sequence[Tensor | None], options: Sequence, outputs: int | None):
    """`row.fn.call` of DTensors, the results as DTensors.

    A dimension of the first tensor that the row lets be split stays split as it is, and what goes along with it in the other tensors
    is split alike. All else is gathered first, and gradients of what is not split are sums over the processes."""
    fn, first = row.fn, tensors[0]
    if row.shards is None:
        fact = f"got {next(t for t in tensors if isinstance(t, DTensor)).placements}; give it the part of this process, to_local()"
        raise RuntimeError(f"{row.name}: there is no rule for a DTensor, {fact}")
    mesh = mesh_of(row.name, tensors)
    whole, along = row.shards(*tensors, *options)
    n = max(1, first.dim())
    free = [d for d in range(first.dim()) if d not in {w % n for w in whole}]
    maps = []  # for each tensor, for each of its dimensions: the free one of the first tensor that it goes along with, or None
    for i, t in enumerate(tensors):
        m = () if t is None else along.get(i, range(n) if t.shape == first.shape else ())
        maps.append([d % n if d is not None and d % n in free else None for d in m])
    split = [_split(i, tensors, maps) for i in range(mesh.ndim)]  # for each dimension of the mesh: the free one that it splits, and how

    local, names = [], fn.forward.__code__.co_varnames  # none for *args
    for t, m, name in zip(tensors, maps, chain(names, repeat(""))):
        if isinstance(t, DTensor):
            placements = _placements(split, m, Replicate())
            t = _Local.apply(_placed(t, mesh, placements), _placements(split, m, Partial()))
        elif t is not None and name == "seed":
            t = t + _number_of_part(mesh, split)  # or all parts would drop the same elements
        local.append(t)

    parted = any([s is not None for s in split])
    summed = row.summed(first.shape, *local, *options) if parted and row.summed is not None else None
    arguments = (*local, *options) if summed is None else summed.arguments
    results = fn.call(arguments[: len(local)], *arguments[len(local) :], outputs=outputs)

    single = not isinstance(results, tuple)
    results = [results] if single else list(results)
    for i, y in enumerate(results):
        if y is not None:
            # Beside the first tensor's shape there is that without what is taken together, and the scalar of a loss.
            m = [d if d in free else None for d in range(n)] if y.dim() == first.dim() else free if y.dim() == len(free) else []
            sizes = [size if d is None else first.shape[d] for d, size in zip(m or [None] * y.dim(), y.shape)]
            if i < len(local) and local[i] is not None and local[i].shape == y.shape:
                sizes = tensors[i].shape
            results[i] = _Whole.apply(y, mesh, _placements(split, m, Partial()), torch.Size(sizes), _stride(y, sizes))
    if summed is not None:
        results[0] = _finished(results[0], summed, mesh, split)
        results = [None if y is None else y.to(summed.dtype) for y in results]
    return results[0] if single else tuple(results)


def mesh_of(op: str, tensors: Sequence[Tensor | None]) -> DeviceMesh:
    """The mesh of all of them; raises where they are not DTensors that can be taken together."""
    mesh = next(t for t in tensors if isinstance(t, DTensor)).device_mesh
    for t in tensors:
        _check(op, t, mesh, may_be_a_number=t is not tensors[0])
    return mesh


def alike(op: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same as DTensors of one mesh, a plain number as the same one in every process."""
    mesh = mesh_of(op, tensors)
    everywhere = [Replicate()] * mesh.ndim
    return [t if t is None or isinstance(t, DTensor) else DTensor.from_local(t, mesh, everywhere, run_check=False) for t in tensors]


def _check(op: str, t: Tensor | None, mesh: DeviceMesh, may_be_a_number: bool) -> None:
    if t is None or (may_be_a_number and t.dim() == 0 and not t.requires_grad and not isinstance(t, DTensor)):
        return
    if not isinstance(t, DTensor):
        fix = "distribute_tensor(tensor, mesh, [Replicate()]) or distribute_module"
        raise RuntimeError(f"{op}: all tensors must be DTensors if one is ({fix}), got a {type(t).__name__} {list(t.shape)}")
    if t.device_mesh != mesh:
        raise RuntimeError(f"{op}: all tensors must be on the mesh of input, {mesh}, got {t.device_mesh}")
    if not all(_splits(p) or p.is_replicate() or p.is_partial() for p in t.placements):
        fact = f"got {t.placements}; redistribute it first"
        raise RuntimeError(f"{op}: a DTensor must be placed by Shard, Replicate or Partial, {fact}")


def _splits(placement) -> bool:
    """By Shard, or by torch's strided one, which flattened dimensions have."""
    return placement.is_shard() or hasattr(placement, "split_factor")


def _split(i: int, tensors: Sequence[Tensor | None], maps: Sequence) -> tuple | None:
    """The dimension of the first tensor that dimension i of the mesh splits: as it is, or else as those are that go along with it."""
    for t, m in zip(tensors, maps):
        placement = t.placements[i] if isinstance(t, DTensor) else Replicate()
        if _splits(placement) and m and m[placement.dim] is not None:
            return m[placement.dim], placement
    return None


def _placements(split: Sequence[tuple | None], m: Sequence[int | None], otherwise) -> tuple:
    """Of a tensor whose dimensions go along with those in m; `otherwise` where the mesh splits one that it does not have."""

    def place(d, placement):
        if d not in m:
            return otherwise
        dim = m.index(d)
        return type(placement)(dim, split_factor=placement.split_factor) if hasattr(placement, "split_factor") else Shard(dim)

    return tuple(Replicate() if s is None else place(*s) for s in split)


def _number_of_part(mesh: DeviceMesh, split: Sequence[tuple | None]) -> int:
    number = 0
    for i, s in enumerate(split):
        if s is not None:
            number = number * mesh.size(i) + mesh.get_local_rank(i)
    return number


def _stride(local: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """Of the whole, with its dimensions in the part's order in memory."""
    stride, step = [1] * local.dim(), 1
    for d in sorted(reversed(range(local.dim())), key=local.stride):
        stride[d], step = step, step * max(1, sizes[d])
    return tuple(stride)


def _finished(total: DTensor, summed, mesh: DeviceMesh, split: Sequence[tuple | None]) -> DTensor:
    """The loss of all processes."""
    everywhere = [Replicate()] * mesh.ndim
    total = total.redistribute(mesh, everywhere)
    divisor = summed.divisor
    if isinstance(divisor, Tensor):
        divisor = DTensor.from_local(divisor, mesh, _placements(split, [], Partial()), run_check=False)
        divisor = divisor.redistribute(mesh, everywhere)
        divisor = torch.where(divisor == 0, math.inf, divisor) if summed.empty_is_zero else divisor
    return total if divisor is None else total / divisor
