# ruff: noqa: E501  (a case a line)
"""Cross entropy over two processes (gloo): values and first gradients are those of the logits side by side."""

import itertools
import re

import pytest
import torch
import torch.distributed as dist

import fusegrad.functional as fused
import processes

N, C = 13, 22
OPTIONS = (
    dict(),
    dict(label_smoothing=0.2, z_loss=0.1),
    dict(logit_softcap=2.0, logit_scale=0.5),
    dict(ignore_index=3, z_loss=0.05),
    dict(return_lse=True, label_smoothing=0.1),
)


def logits(scale=1.0, dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    z = (torch.randn(N, C, generator=make, dtype=torch.float64) * scale).to(dtype)
    return z, torch.randint(C, (N,), generator=make)


def equal_to_one_process(rank, world):
    for options, reduction, (scale, dtype) in itertools.product(
        OPTIONS, ("mean", "sum", "none"), ((1.0, torch.float64), (300.0, torch.float64), (3.0, torch.float32), (3.0, torch.bfloat16))
    ):
        z, target = logits(scale, dtype)
        target[::4] = options.get("ignore_index", -100)
        whole = z.clone().requires_grad_()
        shard = z.chunk(world, 1)[rank].requires_grad_()  # not contiguous
        results = []
        for f, x in ((fused.cross_entropy, whole), (fused.vocab_parallel_cross_entropy, shard)):
            y = f(x, target, reduction=reduction, **options)
            y = y if isinstance(y, tuple) else (y,)
            make = torch.Generator().manual_seed(1)
            cotangents = tuple(torch.randn(t.shape, generator=make, dtype=torch.float64).to(dtype) for t in y)
            results.append((*y, *torch.autograd.grad(y, x, cotangents)))
        (*expected, g), (*found, own) = results
        tight = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else {}
        for a, b in zip((*found, own), (*expected, g.chunk(world, 1)[rank])):
            torch.testing.assert_close(a, b, **tight)


def shards_with_nothing(rank, world):
    """A shard of padding (-inf) is no part of the sum; all items ignored; infinities in an ignored item."""
    z, target = logits()
    target %= C // 2
    z[:, C // 2 :] = -torch.inf
    whole, shard = z.clone().requires_grad_(), z.chunk(world, 1)[rank].clone().requires_grad_()
    expected, found = fused.cross_entropy(whole, target), fused.vocab_parallel_cross_entropy(shard, target)
    torch.testing.assert_close(found, expected)
    (a,), (b,) = torch.autograd.grad(found, shard), torch.autograd.grad(expected, whole)
    torch.testing.assert_close(a, b.chunk(world, 1)[rank])
    nobody = torch.full((N,), -100)
    loss = fused.vocab_parallel_cross_entropy(shard, nobody, reduction="sum")
    assert loss == 0 and not torch.autograd.grad(loss, shard)[0].any()
    assert fused.vocab_parallel_cross_entropy(shard, nobody).isnan()
    some = target.clone()
    some[2] = -100
    bad = shard.detach().clone()
    bad[2] = torch.nan
    bad.requires_grad_()
    loss = fused.vocab_parallel_cross_entropy(bad, some, reduction="none")
    g = torch.autograd.grad(loss.sum(), bad)[0]
    assert loss[2] == 0 and loss.isfinite().all() and g.isfinite().all() and not g[2].any()


def refusals(rank, world):
    z, target = logits()
    shard = z.chunk(world, 1)[rank].clone().requires_grad_()
    refused = re.escape(
        f"vocab_parallel_cross_entropy: there is no derivative but the first, no vmap, no forward mode and no reference over {world}"
    )

    def loss_of(z):
        return fused.vocab_parallel_cross_entropy(z, target)

    (g,) = torch.autograd.grad(loss_of(shard), shard, create_graph=True)  # the first is the kernel's
    with pytest.raises(RuntimeError, match=refused):
        torch.autograd.grad(g.square().sum(), shard)
    assert torch.equal(torch.func.grad(loss_of)(shard), g)
    for transformed, x in (
        (torch.func.hessian(loss_of), shard),
        (torch.func.jacfwd(loss_of), shard),
        (torch.func.vmap(loss_of), shard.detach().expand(3, -1, -1)),
    ):
        with pytest.raises(RuntimeError, match=refused):
            transformed(x)
    with pytest.raises(IndexError, match=rf"target must be in \[0, {C}\) or ignore_index \(-100\), got {C}$"):
        fused.vocab_parallel_cross_entropy(shard, target.clone().fill_(C))
    with pytest.raises(RuntimeError, match="input must have as many columns in every process, got"):
        fused.vocab_parallel_cross_entropy(z[:, : 5 + rank], target % 10)
    alone = [dist.new_group([r]) for r in range(world)]  # a group of one has every derivative
    torch.testing.assert_close(fused.vocab_parallel_cross_entropy(z, target, alone[rank]), fused.cross_entropy(z, target))
    with pytest.raises(ValueError, match="group must have this process in it"):
        fused.vocab_parallel_cross_entropy(z, target, alone[1 - rank])


CASES = (equal_to_one_process, shards_with_nothing, refusals)


def test_two_processes(tmp_path):
    made = processes.make(CASES, tmp_path)
    assert not any(made.values()), made


x, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 7])
BAD = [
    (lambda: fused.vocab_parallel_cross_entropy(None, labels), TypeError, "input must be a Tensor, got NoneType"),
    (lambda: fused.vocab_parallel_cross_entropy(x[0], labels[0]), RuntimeError, "input must be [N, classes of this process], got [8]"),
    (lambda: fused.vocab_parallel_cross_entropy(x, labels[:3]), ValueError, "target must have one class per item, shape [4] for input [4, 8], got [3]"),
    (lambda: fused.vocab_parallel_cross_entropy(x, labels.int()), RuntimeError, "target must be int64 (class indices), got torch.int32"),
    (lambda: fused.vocab_parallel_cross_entropy(x, labels + 1), IndexError, "target must be in [0, 8) or ignore_index (-100), got 8"),
    (lambda: fused.vocab_parallel_cross_entropy(x, labels, reduction="avg"), ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    (lambda: fused.vocab_parallel_cross_entropy(x, labels, label_smoothing=-1), RuntimeError, "label_smoothing must be in [0, 1], got -1"),
    (lambda: fused.vocab_parallel_cross_entropy(x, labels, logit_softcap=0), ValueError, "logit_softcap must be positive or None, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_error_texts(call, error, text):
    with pytest.raises(error, match=re.escape(f"vocab_parallel_cross_entropy: {text}") + "$") as info:
        call()
    assert type(info.value) is error
