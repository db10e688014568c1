"""The CUDA drivers, emulated, over many shapes: the host functions against float64 formulas."""

import itertools

import pytest
import torch
from emulator import build
from torch.nn.functional import cross_entropy, silu

COLS = [1, 2, 7, 8, 31, 32, 33, 64, 127, 128, 255, 256, 1000, 1024, 1025, 4096, 5000, 20000, 40000]
ROWS = [0, 1, 3, 70]
SHAPES = [(r, c) for r, c in itertools.product(ROWS, COLS) if r * c <= 80_000]
PAIRS = [("f64", "f64"), ("f32", "f32"), ("f16", "f16"), ("f16", "f32"), ("bf16", "bf16"), ("bf16", "f32")]
DTYPE = dict(f64=torch.float64, f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16)
LAYOUTS = ["dense", "offset", "padded", "strided", "expanded", "transposed", "middle"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def C():
    return build.extension()


def make(generator, rows, cols, dtype, layout):
    """Values [rows, cols], as a tensor of that layout."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "dense":
        return normal(rows, cols)
    if layout == "offset":
        return normal(rows * cols + 1)[1:].view(rows, cols)
    if layout == "padded":
        return normal(rows, cols + 16)[:, :cols]
    if layout == "strided":
        return normal(rows, 2 * cols)[:, ::2]
    if layout == "expanded":
        return normal(1, cols).expand(rows, cols)
    if layout == "transposed":
        return normal(cols, rows).t()
    return normal(rows, 2, cols)[:, 1]


def close(got, want, dtype, tolerance=64, terms=None):
    """`terms`: what the result is a difference of, where that is larger than the result."""
    assert got.shape == want.shape and got.dtype == dtype
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    ulp = 0.5 * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0
    tiny = 2.0**-24 if dtype == torch.float16 else 0
    if want.numel():
        limit = 1.05 * ulp * want.abs() + tolerance * eps * (want if terms is None else terms).abs().amax() + tiny
        assert ((got.double() - want).abs() <= limit).all(), (got.double() - want).abs().max()


def cases(layout):
    generator = torch.Generator().manual_seed(len(layout))
    for (rows, cols), (t, p) in itertools.product(SHAPES, PAIRS):
        yield rows, cols, DTYPE[t], DTYPE[p], lambda r, c, d, l=layout: make(generator, r, c, d, l)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_rms_norm(C, layout):
    for rows, cols, T, P, values in cases(layout):
        x, dy = values(rows, cols, T), values(rows, cols, T)
        w = None if cols == 33 else values(1, cols, P)[0]
        made = {}
        for seed in (0, 1):
            C.seed(seed)
            y, rstd = C.rms_norm_fwd(x, w, 1, 1e-5, 0.5, False)
            dx, dw = C.rms_norm_bwd(dy, x, w, rstd, 1, 0.5, [True, cols != 7])
            made[seed] = [y, rstd, dx] + ([] if dw is None else [dw])
        assert all(a.equal(b) for a, b in zip(made[0], made[1]))
        a, g = x.double(), dy.double()
        v = torch.ones(cols, dtype=a.dtype) if w is None else w.double() + 0.5
        r = torch.rsqrt(a.square().mean(1, keepdim=True) + 1e-5)
        close(y, a * r * v, T)
        close(rstd, r[:, 0], T if T.itemsize == 8 else torch.float32)
        close(dx, r * g * v - a * r**3 * (a * g * v).mean(1, keepdim=True), T, 256, r * g * v)
        if dw is not None:
            close(dw, (g * a * r).sum(0), T if w is None else P, 256)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_swiglu(C, layout):
    for rows, cols, T, P, values in cases(layout):
        if T != P:
            continue
        gate, up, dy = (values(rows, cols, T) for _ in range(3))
        g, u, d = gate.double().requires_grad_(), up.double().requires_grad_(), dy.double()
        want = silu(g) * u
        dg, du = torch.autograd.grad(want, (g, u), d)
        for seed in (0, 1):
            C.seed(seed)
            close(C.swiglu_fwd(gate, up, 0), want.detach(), T)
            for needed in ([True, True], [True, False], [False, True]):
                got = C.swiglu_bwd(dy, gate, up, 0, needed)
                if needed[0]:
                    close(got[0], dg, T)
                if needed[1]:
                    close(got[1], du, T)
        for dim in (0, 1):
            packed = torch.cat((gate, up), dim)
            close(C.swiglu_fwd(packed, None, dim), want.detach(), T)
            close(C.swiglu_bwd(dy, packed, None, dim, [True, False])[0], torch.cat((dg, du), dim), T)


OPTIONS = [dict(), dict(smoothing=0.1, z_loss=1e-3), dict(softcap=3.0, scale=0.7), dict(smoothing=0.2, weight=True, softcap=2.0)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "spatial"])
def test_emulated_cross_entropy(C, layout):
    for n, (rows, cols, T, P, values) in enumerate(cases("dense" if layout == "spatial" else layout)):
        if layout == "spatial":  # [N, C, *]
            x = values(max(rows, 1) * cols, 5, T).view(max(rows, 1), cols, 5)
            flat = x.movedim(1, -1).reshape(-1, cols)
        else:
            x = flat = values(rows, cols, T)
        option = dict(dict(smoothing=0.0, z_loss=0.0, softcap=0.0, scale=1.0, weight=False), **OPTIONS[n % len(OPTIONS)])
        weight = option.pop("weight")
        smoothing, z_loss, softcap, scale = option.values()
        w = values(1, cols, P)[0].abs() if weight else None
        generator = torch.Generator().manual_seed(n)
        target = torch.randint(0, cols, x[:, 0].shape if layout == "spatial" else (rows,), generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.2] = -100
        C.seed(n)
        loss, lse, top, log_sum, _ = C.cross_entropy_fwd(
            x, target, w, None, -100, smoothing, z_loss, softcap, scale, False, False, 0.0, False, True, True
        )
        a = flat.double().requires_grad_()
        z = a * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        keep = target.flatten() != -100
        want = (
            cross_entropy(z, target.flatten(), None if w is None else w.double(), reduction="none", label_smoothing=smoothing)
            + z_loss * keep * z.logsumexp(1).square()
        )
        wide = T if T.itemsize == 8 else torch.float32
        close(loss.flatten(), want.detach(), wide)
        close(lse.flatten(), (z.logsumexp(1) * keep).detach(), wide)
        dloss, dlse = (torch.randn(target.shape, generator=generator, dtype=wide) for _ in range(2))
        total = (want * dloss.double().flatten()).sum() + (z.logsumexp(1) * keep * dlse.double().flatten()).sum()
        (da,) = torch.autograd.grad(total, a)
        dx = C.cross_entropy_bwd(dloss, dlse, x, target, w, top, log_sum, None, -100, smoothing, z_loss, softcap, scale)
        dx = dx.movedim(1, -1).reshape(-1, cols) if layout == "spatial" else dx
        close(dx, da, T, 512, torch.cat((da.flatten(), dloss.double().flatten(), dlse.double().flatten())))
        mean, *_, divisor = C.cross_entropy_fwd(
            x, target, w, None, -100, smoothing, z_loss, softcap, scale, True, True, 3.0, False, True, False
        )
        close(mean, want.detach().sum() / 3, wide, 256)
        assert divisor == 3


def test_emulated_no_columns(C):
    x = torch.empty(5, 0)
    y, rstd = C.rms_norm_fwd(x, None, 1, 1e-5, 0.0, False)
    assert y.shape == (5, 0) and rstd.isnan().all()
    dx, dw = C.rms_norm_bwd(x, x, None, rstd, 1, 0.0, [True, True])
    assert dx.shape == (5, 0) and dw.shape == (0,)


def test_emulated_many_rows(C):
    x, dy = torch.randn(66_000, 5), torch.randn(66_000, 5)
    y, rstd = C.rms_norm_fwd(x, None, 1, 1e-5, 0.0, False)
    dx, dw = C.rms_norm_bwd(dy, x, None, rstd, 1, 0.0, [True, True])
    a, g = x.double(), dy.double()
    r = torch.rsqrt(a.square().mean(1, keepdim=True) + 1e-5)
    close(y, a * r, torch.float32)
    close(dw, (g * a * r).sum(0), torch.float32, 1024)
