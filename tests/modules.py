"""A call of every module, and all of them as one model."""

import torch

from fusegrad import nn


def modules():
    """(module, torch's of the same arguments or None, arguments of a call): every module, with most of its options."""
    x, z = torch.randn(5, 16), torch.randn(5, 7)
    labels = torch.randint(7, (5,))
    yield nn.RMSNorm(16), torch.nn.RMSNorm(16), (x,)
    yield nn.RMSNorm((4, 16), eps=1e-3), torch.nn.RMSNorm((4, 16), eps=1e-3), (torch.randn(2, 4, 16),)
    yield nn.RMSNorm(16, elementwise_affine=False), torch.nn.RMSNorm(16, elementwise_affine=False), (x,)
    yield nn.RMSNorm(16, weight_offset=1.0, cast_order="llama"), None, (x,)
    for args in (dict(), dict(eps=1e-3, elementwise_affine=False), dict(bias=False)):
        yield nn.LayerNorm(16, **args), torch.nn.LayerNorm(16, **args), (x,)
    yield nn.LayerNorm((4, 16)), torch.nn.LayerNorm((4, 16)), (torch.randn(2, 4, 16),)
    yield nn.AddRMSNorm(16, weight_offset=1.0), None, (x, x)
    yield nn.AddLayerNorm(16, bias=False, p=0.5), None, (x, x)
    yield nn.DyT(16), None, (x,)
    yield nn.DyT((4, 16), 0.7, bias=False), None, (torch.randn(2, 4, 16),)
    yield nn.Dropout(0.2).eval(), torch.nn.Dropout(0.2).eval(), (x,)
    yield nn.Dropout(0.2), None, (x,)
    yield nn.BiasDropoutAdd(16, p=0.2), None, (x, torch.randn(5, 16))
    for unit in (nn.SwiGLU, nn.GeGLU, nn.GeGLUTanh, nn.ReGLU):
        yield unit(), None, (x,)
    yield nn.GLU(), torch.nn.GLU(), (x,)
    yield nn.GLU(0), torch.nn.GLU(0), (torch.randn(6, 5),)
    yield nn.BiasAct(16, "silu", scale=2.0), None, (x,)
    yield nn.BiasAct(None), None, (x,)
    yield nn.Scale(0.5), None, (x,)
    yield nn.Exp(), None, (x,)
    yield nn.Cube(), None, (x,)
    yield nn.GradientReversal(0.3), None, (x,)
    yield nn.Linear(16, 9), torch.nn.Linear(16, 9), (x,)
    yield nn.Linear(16, 9, bias=False), torch.nn.Linear(16, 9, bias=False), (x,)
    yield nn.Linear(16, 9, activation="gelu"), None, (x,)
    yield nn.MLP((16, 24, 7), "silu", "tanh"), None, (x,)
    yield nn.GatedMLP(16, 24, recompute=True), None, (x,)
    images = torch.randn(3, 6, 4, 5)
    yield nn.LayerNorm2d(6), None, (images,)
    yield nn.GroupNorm(3, 6), torch.nn.GroupNorm(3, 6), (images,)
    yield nn.GroupNorm(2, 6, eps=1e-3, affine=False), torch.nn.GroupNorm(2, 6, eps=1e-3, affine=False), (images,)
    yield nn.GroupNorm(2, 6, activation="silu"), None, (images,)
    yield nn.BatchNorm1d(16), torch.nn.BatchNorm1d(16), (x,)
    yield nn.BatchNorm2d(6), torch.nn.BatchNorm2d(6), (images,)
    args = dict(momentum=None, affine=False, track_running_stats=False)
    yield nn.BatchNorm2d(6, **args), torch.nn.BatchNorm2d(6, **args), (images,)
    yield nn.BatchNorm3d(6, activation="relu"), None, (images[..., None], images[..., None])
    yield nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(), (z, labels)
    args = dict(weight=torch.rand(7), ignore_index=2, reduction="sum", label_smoothing=0.1)
    yield nn.CrossEntropyLoss(**args), torch.nn.CrossEntropyLoss(**args), (z, labels)
    yield nn.CrossEntropyLoss(z_loss=1e-3, logit_softcap=4.0), None, (z, labels)
    yield nn.LinearCrossEntropyLoss(16, 7), torch.nn.LinearCrossEntropyLoss(16, 7), (x, labels)
    args = dict(bias=True, weight=torch.rand(7), ignore_index=2, reduction="none", label_smoothing=0.1)
    yield nn.LinearCrossEntropyLoss(16, 7, **args), torch.nn.LinearCrossEntropyLoss(16, 7, **args), (x, labels)
    yield nn.LinearCrossEntropyLoss(16, 7, z_loss=1e-3, logit_softcap=4.0), None, (x, labels)
    p = torch.softmax(torch.randn(5, 7), 1)
    yield nn.Softmax(1), torch.nn.Softmax(1), (z,)
    yield nn.LogSoftmax(-1), torch.nn.LogSoftmax(-1), (z,)
    yield nn.ScaledMaskedSoftmax(scale=0.5, causal=True), None, (z, z > 1)
    yield nn.MSELoss(), torch.nn.MSELoss(), (z, p)
    yield nn.L1Loss(reduction="sum"), torch.nn.L1Loss(reduction="sum"), (z, p)
    yield nn.HuberLoss(delta=0.5), torch.nn.HuberLoss(delta=0.5), (z, p)
    yield nn.SmoothL1Loss(beta=0.3, reduction="none"), torch.nn.SmoothL1Loss(beta=0.3, reduction="none"), (z, p)
    args = dict(weight=torch.rand(1, 7), pos_weight=torch.rand(7))
    yield nn.BCEWithLogitsLoss(**args), torch.nn.BCEWithLogitsLoss(**args), (z, p)
    args = dict(reduction="batchmean", log_target=True)
    yield nn.KLDivLoss(**args), torch.nn.KLDivLoss(**args), (z.log_softmax(1), p.log())
    yield nn.SigmoidFocalLoss(reduction="mean"), None, (z, p)
    yield nn.JSDivLoss(beta=0.3), None, (z.log_softmax(1), p)
    q = torch.randn(2, 3, 5, 8)
    yield nn.RotaryEmbedding(8), None, (q, q[:, :1])
    yield nn.RotaryEmbedding(6, 100.0, 7, interleaved=True), None, (q, q)


def free_dim(module) -> int:
    """The dimension of the arguments that may have any size."""
    return 1 if getattr(module, "dim", None) == 0 else 0


def other(module, args) -> tuple:
    """Arguments of another size, with other numbers in each row."""
    dim = free_dim(module)
    n = args[0].shape[dim]
    order = torch.tensor([*reversed(range(n)), 0, 0, 1])
    return tuple(a.index_select(dim, order) for a in args)


def flat(results) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(results) if t is not None]


class Every(torch.nn.Module):
    """All given modules; called with the arguments of each."""

    def __init__(self, modules):
        super().__init__()
        self.modules_ = torch.nn.ModuleList(modules)

    def forward(self, calls):
        return [flat(module(*args)) for module, args in zip(self.modules_, calls)]
