"""Two fused ops of one's own, each a header and the ten lines here: a gate, element by element, and a norm over rows with a gate.

    python examples/custom_op/custom_op.py

compiles them, runs the conformance suite on each, and compares the time and the memory of a forward and a backward with the same
code in torch. Memory is what the backward keeps.
"""

import time
from pathlib import Path
from statistics import median

import torch

import fusegrad.extension
from fusegrad.extension import wide
from fusegrad.testing import check

HERE = Path(__file__).resolve().parent


def gaussian_gate_reference(x, z, sharpness=1.0):
    return (wide(x) * torch.exp(-sharpness * wide(z).square())).to(x.dtype)


def gated_rms_norm_reference(x, z, weight=None, eps=1e-5):
    y = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps) * wide(z) * torch.sigmoid(wide(z))
    return (y if weight is None else y * wide(weight)).to(x.dtype)


def load_gaussian_gate(**options):
    return fusegrad.extension.load("gaussian_gate", HERE / "gaussian_gate.h", gaussian_gate_reference, **options)


def load_gated_rms_norm(**options):
    return fusegrad.extension.load("gated_rms_norm", HERE / "gated_rms_norm.h", gated_rms_norm_reference, **options)


def gaussian_gate_samples(make):
    yield make(5, 33), make(5, 33), 2.0
    yield make(2, 3, 64, layout="row_strided"), make(2, 3, 64), 0.5
    yield make(7, 19, layout="transposed"), make(7, 19, layout="expanded"), 1.0


def gated_rms_norm_samples(make):
    yield make(5, 33), make(5, 33), make.param(33), 1e-5
    yield make(2, 3, 64, layout="row_strided"), make(2, 3, 64), make.param(64), 1e-3
    yield make(7, 19, layout="transposed"), make(7, 19, layout="expanded"), make.param(19), 1e-5
    yield make(4, 40), make(4, 40), None, 1e-5


def measure(f, tensors):
    """Milliseconds, and megabytes that the backward keeps beside the inputs."""
    kept, times = {}, []

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = f(*tensors)
    more = sum(size for at, size in kept.items() if at not in {t.untyped_storage().data_ptr() for t in tensors})
    for _ in range(7):
        start = time.perf_counter()
        torch.autograd.grad(f(*tensors), tensors, torch.ones_like(y))
        if y.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3, more / 2**20


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for load, reference, samples in (
        (load_gaussian_gate, gaussian_gate_reference, gaussian_gate_samples),
        (load_gated_rms_norm, gated_rms_norm_reference, gated_rms_norm_samples),
    ):
        op = load()
        check(op, reference, samples).print()
        shapes = [(2048, 2048), (2048, 2048), (2048,)][: len(reference.__defaults__) + reference.__code__.co_argcount - 2]
        tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        for what, f in (("fused", op), ("torch", reference)):
            ms, kept = measure(f, tensors)
            print(f"{op.__name__} of 2048 x 2048 on {device}, {what}: {ms:.2f} ms forward and backward, {kept:.0f} MB kept")


if __name__ == "__main__":
    main()
