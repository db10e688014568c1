"""The budget rule, which decides whether a result is right: how a callable is called, what its reference gives, and what error is allowed.

`op` is a row of fusegrad's table, or what `fusegrad.testing.check` makes of a callable and its reference: a callable `functional` that
is the reference within `use_reference()`, and what is said of it (`permutes`, `rounding`, `units`, ...: see `fusegrad._op.Op`)."""

from __future__ import annotations

import itertools

import torch

from .. import _samples
from .._op import Sample, use_reference, wide_dtype

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
PAIRS = ((F64, F64), (F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32))  # of rows and parameters


def tensors(sample):
    return {k: v for k, v in sample.kwargs.items() if isinstance(v, torch.Tensor)}


def changed(sample, arguments):
    """The sample with other arguments."""
    return type(sample)(sample.name, sample.kwargs | arguments)


def laid_out(sample, layout):
    """The sample with its rows, and all that has their shape, in that layout."""
    rows = next(v for v in tensors(sample).values() if v.is_floating_point())
    return changed(sample, {k: _samples.lay_out(v, layout) for k, v in tensors(sample).items() if v.shape == rows.shape})


def diffable(op, sample):
    return [k for k, v in tensors(sample).items() if v.is_floating_point() and k not in op.constants]


def with_grad(op, sample, which=None):
    """The sample with leaves that require grad, of the same layout; and the leaves by name."""
    kwargs = sample.kwargs
    leaves = {k: kwargs[k].detach().requires_grad_() for k in (diffable(op, sample) if which is None else which)}
    return Sample(sample.name, {**kwargs, **leaves}), leaves


def seed_torch(seed):
    """torch.manual_seed, which for each kind of accelerator that it does not find keeps a stack trace: 2 to 3 ms a call."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def call(op, sample):
    """The outputs that can be differentiated, as a tuple; what the op draws is the same each time."""
    seed_torch(17)
    out = op.functional(**sample.kwargs)
    return out if isinstance(out, tuple) else (out,)


def cotangents(outputs, seed=1):
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(y.shape, generator=make, dtype=F64).to(y.device, y.dtype) for y in outputs)


def gradients(outputs, leaves, cotangent, **options):
    """Of the outputs that depend on a leaf, as torch.autograd.grad gives them; zeros for a leaf that none depends on."""
    pairs = [(y, g) for y, g in zip(outputs, cotangent) if y.requires_grad]
    if not leaves:
        return ()
    assert pairs, "no result requires grad"
    zeros = {} if options.get("is_grads_batched") else dict(materialize_grads=True)
    return torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], **zeros, **options)


def run(op, sample, cotangent=None, which=None):
    """Outputs and gradients of one call under a random cotangent: {name: tensor}."""
    sample, leaves = with_grad(op, sample, which)
    outputs = call(op, sample)
    cotangent = cotangents(outputs) if cotangent is None else cotangent
    grads = gradients(outputs, leaves, cotangent)
    result = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return result | {f"gradient of {k}": g for k, g in zip(leaves, grads)}


def reference(op, sample, dtype, cotangent, which=None, stored=None):
    """The same by the op's reference in another dtype; its backward starts from the output `stored` if that is given."""
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors(sample).items()}

    def pack(t):
        return t if stored is None or not t.is_floating_point() or t.shape != stored.shape else stored.to(t.dtype)

    with use_reference(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return run(op, Sample(sample.name, sample.kwargs | cast), tuple(g.to(dtype) for g in cotangent), which)


def stepwise(op, sample, cotangent, which=None):
    """The same by torch's own functions, each of which rounds its result to the dtype at hand."""
    sample, leaves = with_grad(op, sample, which)
    y = op.torch(**sample.kwargs)
    grads = gradients((y,), leaves, cotangent)
    return {"output 0": y.detach()} | {f"gradient of {k}": g for k, g in zip(leaves, grads)}


def permuted(op, sample, cotangent, seed):
    """The call with its reduced dimension in another order, and what puts a result back in order."""
    dims = op.permutes(sample.kwargs)
    if not dims:
        return sample, cotangent, lambda results: results
    first = sample.kwargs[next(iter(dims))]
    dim = next(iter(dims.values())) % first.dim()
    order = torch.randperm(first.shape[dim], generator=torch.Generator().manual_seed(seed)).to(first.device)
    inverse = order.argsort()
    kwargs = dict(sample.kwargs)
    for k, d in dims.items():
        if kwargs.get(k) is None:
            continue
        if kwargs[k].is_floating_point() or kwargs[k].dtype == torch.bool:
            kwargs[k] = kwargs[k].index_select(d, order)
        else:  # labels: the numbers move with the classes
            known = (kwargs[k] >= 0) & (kwargs[k] < len(order)) & (kwargs[k] != kwargs.get("ignore_index", -100))
            kwargs[k] = torch.where(known, inverse[kwargs[k].clamp(0, len(order) - 1)], kwargs[k])
            if 0 <= kwargs.get("ignore_index", -100) < len(order):
                # Keep the ignored class recognisable: it must be a number that no label has after the permutation.
                kwargs[k] = torch.where(known, kwargs[k], -100)
                kwargs["ignore_index"] = -100
    along = dims.get("output", dim)  # None: a result of the same shape by chance
    moved = tuple(g.index_select(along, order) if g.shape == first.shape and along is not None else g for g in cotangent)

    def restore(results):
        back = {}
        for k, v in results.items():
            d = dims.get(k.removeprefix("gradient of "), along if v.shape == first.shape else None)
            back[k] = v if d is None else v.index_select(d, inverse)
        return back

    return Sample(sample.name, kwargs), moved, restore


def float32(value):
    """Float64 rounded; all else, and a sample without float64, as it is."""
    if isinstance(value, Sample):
        doubles = {k: v.float() for k, v in tensors(value).items() if v.dtype == F64}
        return Sample(value.name, value.kwargs | doubles) if doubles else value
    return value.float() if value.dtype == F64 else value


def beside(sample, seed, by=1e-3, keep=False):
    """The call with other roundings: each number moved by up to `by` of it, 16-bit ones to float32 unless they keep their dtype."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t):
        factor = 1 + (torch.rand(t.shape, generator=generator).to(t.device) - 0.5) * 2 * by
        return (t.double() * factor).to(t.dtype if keep else wide_dtype(t))

    return changed(sample, {k: moved(v) for k, v in tensors(sample).items() if v.is_floating_point()})


def ulp(x, dtype):
    """The distance between neighbouring numbers of a 16-bit dtype at x."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp_min(info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(x, info.eps), exponent)


def budget(op, sample, cotangent, which=None, stored=None):
    """For each result: the float64 reference, and the error that a correct kernel may have (elementwise):

    h + 3 E + 4 eps(A) max|r64| (the 4 is `units` in the row), where E is the largest error of the reference in the accumulate type A
    on the inputs as given and on some a little beside them, with the reduced dimension in other orders, and h half an ulp (and 1% of
    it) of a result stored in 16 bits. With a matrix product in 16 bits, whose result is rounded before it is used, E is also that of
    the reference with all steps in 16 bits."""
    if op.stored is not None:
        with use_reference(), torch.no_grad():
            sample = Sample(sample.name, sample.kwargs | op.stored(sample.kwargs, call(op, sample)))
    rows = next(v for v in tensors(sample).values() if v.is_floating_point())
    extra = () if stored is None else (stored,)
    r64 = reference(op, sample, F64, cotangent, which, *extra)
    errors = {k: torch.zeros((), dtype=F64, device=v.device) for k, v in r64.items()}
    # What float64 may lose is what float32 loses, in units of its own.
    first, (*grads,) = float32(sample), (float32(g) for g in (*cotangent, *extra))
    one_row = rows.dim() == 0 or rows.numel() == rows.shape[-1]
    # The fewer elements, the more orders it takes to see the worst case.
    largest = max(v.numel() for v in tensors(sample).values())
    orders = 16 if one_row else 8 if rows.numel() <= 256 else 3 if largest <= 2_000_000 else 1
    for seed in range(1 + orders):
        near = beside(first, seed) if seed else first
        n = len(cotangent)
        exact = r64 if near is sample else reference(op, near, F64, grads[:n], which, *grads[n:])
        other, moved, restore = permuted(op, near, grads, seed) if seed else (near, grads, lambda results: results)
        for k, v in restore(reference(op, other, F32, moved[:n], which, *moved[n:])).items():
            difference = (v.to(F64) - exact[k]).abs()
            difference = difference[difference.isfinite()]
            if difference.numel():
                errors[k] = torch.maximum(errors[k], difference.max())
    accumulate = F64 if rows.dtype == F64 else F32
    if accumulate == F64:
        errors = {k: e * torch.finfo(F64).eps / torch.finfo(F32).eps for k, e in errors.items()}
        for seed in range(1, 1 + orders):  # and what its own order makes: torch adds up some float32 in float64
            other, moved, restore = permuted(op, sample, (*cotangent, *extra), seed)
            n = len(cotangent)
            for k, v in restore(reference(op, other, F64, moved[:n], which, *moved[n:])).items():
                difference = (v - r64[k]).abs()
                errors[k] = torch.cat((errors[k].reshape(1), difference[difference.isfinite()])).max()
    if op.gemm == "torch" and rows.dtype in (F16, BF16):
        eps = torch.finfo(rows.dtype).eps
        for seed in range(4):
            near = beside(sample, seed, 2 * eps, keep=True) if seed else sample
            exact = reference(op, near, F64, cotangent, which) if seed else r64
            for k, v in stepwise(op, near, cotangent, which).items():
                difference = (v.to(F64) - exact[k]).abs()
                errors[k] = torch.cat((errors[k].reshape(1), difference[difference.isfinite()])).max()
    allowed = {}
    for k, r in r64.items():
        finite = r[r.isfinite()].abs()
        largest = finite.max() if finite.numel() else torch.zeros((), dtype=F64)
        allowed[k] = (3 * errors[k] + op.units * torch.finfo(accumulate).eps * largest).expand(r.shape)
    return r64, allowed


def compare(what, value, expected, limit):
    """Asserts that NaN and infinities are where they are expected and that no error is over its limit; the worst one is named."""
    assert value.shape == expected.shape, f"{what}: shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
    value, r = value.to(F64), expected.to(F64)
    assert torch.equal(value.isnan(), r.isnan()), f"{what}: NaN in other places than the reference"
    infinite = r.isinf()
    assert torch.equal(value[infinite], r[infinite]) and not value[~infinite].isinf().any(), f"{what}: Inf in other places"
    finite = r.isfinite()
    excess = ((value - r).abs() - limit)[finite]
    if excess.numel() and excess.max() > 0:
        at = excess.argmax()
        raise AssertionError(
            f"{what}: error {(value - r).abs()[finite][at]:.3e} is over the budget {limit[finite][at]:.3e} "
            f"(value {value[finite][at]:.9g}, reference {r[finite][at]:.9g}); worst of {excess.numel()}"
        )


def close(what, value, expected, tolerance, scale=1.0):
    """Asserts that two results of one dtype are the same but for the tolerance, absolute (times `scale`) and relative."""
    assert value.dtype == expected.dtype, f"{what}: {value.dtype} instead of {expected.dtype}"
    compare(what, value, expected, tolerance * (scale + expected.abs().to(F64)))


def assert_right(op, sample, results, cotangent, which=None):
    """Asserts that results of `run` are within the budget; the worst one is named."""
    r64, allowed = budget(op, sample, cotangent, which, results["output 0"] if op.saves_output else None)
    assert results.keys() == r64.keys(), f"{', '.join(results)} instead of {', '.join(r64)}"
    for k, value in results.items():
        r, limit = r64[k], allowed[k]
        if value.dtype != F64:  # a number beyond the range of the type is an infinity of it
            info = torch.finfo(value.dtype)
            r = torch.where(r.abs() > info.max * (1 + info.eps / 4), r.sign() * torch.inf, r)
        if value.dtype in (F16, BF16):
            limit = limit + op.rounding(sample.kwargs) * ulp(r, value.dtype)
        compare(k, value, r, limit)


def budget_breach(*args) -> str | None:
    """What `assert_right` would raise, as text."""
    try:
        assert_right(*args)
    except AssertionError as error:
        return str(error)
    return None


def subsets(keys):
    return itertools.chain.from_iterable(itertools.combinations(keys, n) for n in range(len(keys) + 1))
