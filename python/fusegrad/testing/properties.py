"""What a differentiable op must do, one function each: it raises where an op breaks the property on that sample, and returns the reason
where the property does not apply. Tests of fusegrad run them on its table, `fusegrad.testing.check` on anybody's callable."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from .._op import Sample, use_reference
from .._samples import LAYOUTS, Make, lay_out
from .budget import (
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    assert_right,
    beside,
    call,
    changed,
    close,
    compare,
    cotangents,
    diffable,
    gradients,
    laid_out,
    run,
    subsets,
    tensors,
    with_grad,
)


@dataclass(frozen=True)
class Property:
    holds: Callable  # holds(op, sample, *variant)
    pairs: tuple  # the (rows, parameters) dtypes that show it
    variants: tuple

    @property
    def name(self) -> str:
        return self.holds.__name__


class NotApplicable(Exception):
    """There is nothing to compare with; fusegrad's own references never raise it."""


PROPERTIES: dict[str, Property] = {}
ONE, DOUBLE = ((F32, F32),), ((F64, F64),)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-30, 1e-42, 0.0)
INFINITE = "a value that is not finite has no derivative to compare"


def declare(*pairs, variants=None):
    def decorate(function):
        PROPERTIES[function.__name__] = Property(function, pairs, ((),) if variants is None else tuple((v,) for v in variants))
        return function

    return decorate


def rows_of(sample):
    """The name of the first floating-point tensor, and that tensor."""
    return next((k, v) for k, v in tensors(sample).items() if v.is_floating_point())


def bits(t):
    return t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_bits(found, expected, what=""):
    for k, a, b in zip(expected, found, expected.values()):
        assert same_bits(a, b), f"{what}{k}: other bits, off by up to {(a.double() - b.double()).abs().nan_to_num().max():.3e}"


def loosely(expected):
    """The tolerance and scale for sums of which little may be left: they are as exact as their largest value."""
    return 1e-4 if expected.dtype == F32 else 1e-9, max([1.0, *expected.abs().flatten().tolist()])


def finite(op, sample):
    return all(y.isfinite().all() for y in call(op, sample))


# --- values and first gradients ------------------------------------------------------------------------------------------------


@declare(*PAIRS)
def values_and_gradients(op, sample):
    """Results and all gradients, under random incoming gradients, are within the error budget; results have the reference's dtypes."""
    outputs = call(op, sample)
    with use_reference(), torch.no_grad():
        for i, (y, r) in enumerate(zip(outputs, call(op, sample))):
            assert y.dtype == r.dtype, f"output {i}: {y.dtype} instead of {r.dtype}"
    cotangent = cotangents(outputs)
    assert_right(op, sample, run(op, sample, cotangent), cotangent)


@declare(*ONE, variants=LAYOUTS)
def layouts(op, sample, layout):
    """Inputs and incoming gradients in every layout; on the CPU with the bits of the contiguous ones, if the op says so."""
    sample = laid_out(sample, layout)
    cotangent = tuple(lay_out(g, layout) for g in cotangents(call(op, sample)))
    found = run(op, sample, cotangent)
    if op.layout_bits and rows_of(sample)[1].is_cpu:
        dense = changed(sample, {k: v.contiguous() for k, v in tensors(sample).items()})
        assert_same_bits(found.values(), run(op, dense, tuple(g.contiguous() for g in cotangent)))
    else:
        assert_right(op, sample, found, cotangent)


def resized(op, sample, rows):
    """The sample with so many rows: the first dimension of the main tensor and of all that share it, or else of those with its very
    shape; whichever the reference takes. None if neither."""
    _, main = rows_of(sample)
    for alike in (lambda t: t.dim() and t.shape[0] == main.shape[0], lambda t: t.shape == main.shape):

        def first(n, alike=alike):
            return changed(sample, {k: v[torch.arange(n, device=v.device) % len(v)] for k, v in tensors(sample).items() if alike(v)})

        try:
            with use_reference(), torch.no_grad():
                call(op, first(len(main) + 2)), call(op, first(rows))
        except Exception:  # the reference's word for: no such call
            continue
        return first(rows)
    return None


@declare(*ONE, variants=(0, 1, 2, 3, 65_537))
def sizes(op, sample, rows):
    """No rows, one, few, many: within the error budget, wherever the reference takes that many."""
    _, main = rows_of(sample)
    if main.dim() < 2 or not len(main) or main.numel() // len(main) * rows > 2**20:
        return "no dimension of rows, or too many elements"
    sample = resized(op, sample, rows)
    if sample is None:
        return "the reference does not take another number of rows"
    return values_and_gradients(op, sample)


@declare((F32, F32), (BF16, BF16), variants=SPECIAL)
def special_values(op, sample, value):
    """One odd element in the first row, a whole odd row, and rows beside them that must not notice."""
    k, x = rows_of(sample)
    if x.dim() < 2 or len(x) < 3 or not x.numel():
        return "fewer than three rows"
    x = x.clone()
    x[(0,) * (x.dim() - 1)][min(3, x.shape[-1] - 1)] = value
    x[2] = value
    sample = changed(sample, {k: x})
    cotangent = cotangents(call(op, sample))
    assert_right(op, sample, run(op, sample, cotangent), cotangent)


# --- orders of derivative --------------------------------------------------------------------------------------------------------


def differentiable_call(op, sample):
    """f(*leaves), the leaves, dense, and why there is nothing to check, if so."""
    kwargs, keys = sample.kwargs, diffable(op, sample)
    leaves = [kwargs[k].detach().clone(memory_format=torch.contiguous_format).requires_grad_() for k in keys]

    def placed(v, like):
        """With the strides of the sample's tensor, by a differentiable copy, where they do not overlap."""
        if 0 in like.stride() or type(v) is not torch.Tensor or torch._C._functorch.is_functorch_wrapped_tensor(v):
            return v
        return torch.empty_strided(like.shape, like.stride(), dtype=v.dtype, device=v.device).copy_(v)

    def f(*values):
        out = call(op, Sample("", kwargs | {k: placed(v, kwargs[k]) for k, v in zip(keys, values)}))
        return tuple(y for y in out if y.isfinite().all()) if len(out) > 1 else out[0]

    reason = INFINITE if not finite(op, sample) else None if sum(t.numel() for t in leaves) else "no elements"
    return f, leaves, reason


@declare(*DOUBLE)
def gradcheck(op, sample):
    """torch.autograd.gradcheck in float64."""
    f, leaves, reason = differentiable_call(op, sample)
    if not op.true_gradient:
        return "its gradient is by design not the derivative of its value"
    if reason is None:
        torch.autograd.gradcheck(f, leaves, fast_mode=sum(t.numel() for t in leaves) > 200)
    return reason


@declare(*DOUBLE)
def gradgradcheck(op, sample):
    """torch.autograd.gradgradcheck in float64."""
    f, leaves, reason = differentiable_call(op, sample)
    if reason is None:
        torch.autograd.gradgradcheck(f, leaves, fast_mode=sum(t.numel() for t in leaves) > 60)
    return reason


def penalty_gradients(op, sample, cotangent):
    s, leaves = with_grad(op, sample)
    outputs = call(op, s)
    grads = gradients(outputs, leaves, cotangent, create_graph=True)
    loss = sum((y * g).sum() for y, g in zip(outputs, cotangent)) + sum(g.square().sum() for g in grads)
    return {f"second order, gradient of {k}": g for k, g in zip(leaves, gradients((loss,), leaves, (torch.ones_like(loss),)))}


@declare(*DOUBLE, *ONE)
def gradient_penalty(op, sample, may_raise=False):
    """A loss plus the squared norm of its gradient, as in WGAN-GP: equal to the reference."""
    if not finite(op, sample):
        return INFINITE
    cotangent = cotangents(call(op, sample))
    try:
        ours = penalty_gradients(op, sample, cotangent)
    except RuntimeError:
        if may_raise:
            return None
        raise
    with use_reference():
        expected = penalty_gradients(op, sample, cotangent)
    for k, b in expected.items():
        close(k, ours[k], b, *loosely(b))


@declare(*DOUBLE)
def no_silent_second_order(op, sample):
    """The same gradient is right, or an error: never a wrong number."""
    return gradient_penalty(op, sample, may_raise=True)


@declare(*ONE)
def subsets_of_requires_grad(op, sample):
    """Whichever inputs require grad, the gradients have the same bits."""
    cotangent = cotangents(call(op, sample))
    full = run(op, sample, cotangent)
    for which in subsets(diffable(op, sample)):
        found = run(op, sample, cotangent, which)
        assert_same_bits(found.values(), {k: full[k] for k in found}, f"requires_grad of {', '.join(which) or 'none'}: ")


def functions_of(outputs):
    """The nodes of autograd.Functions in a graph."""
    nodes, found = [y.grad_fn for y in outputs if y.requires_grad], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [n for n, _ in node.next_functions]
    return [n for n in found if hasattr(n, "_forward_cls")]


@declare(*ONE)
def unneeded_gradients(op, sample):
    """A backward gives None for an input that does not require grad: `needs_input_grad` is respected."""
    keys, seen = diffable(op, sample), []
    if len(keys) == 1:
        return "one differentiable input"

    def watch(node):
        def note(grads, _):
            seen.append((node.name(), [i for i, (g, edge) in enumerate(zip(grads, node.next_functions)) if g is not None and not edge[0]]))

        return node.register_hook(note)

    for k in keys:
        s, leaves = with_grad(op, sample, [k])
        outputs = call(op, s)
        handles = [watch(node) for node in functions_of(outputs)]
        gradients(outputs, leaves, cotangents(outputs))
        for handle in handles:  # a node and its hook would keep each other alive
            handle.remove()
        for name, extra in seen:
            assert not extra, f"{name}: where {k} alone requires grad, the gradient of its tensor argument {extra[0]} is computed too"
    return None if seen else "no autograd.Function in its graph"


@declare(*DOUBLE)
def unused_results(op, sample):
    """Where one of several results is used, the gradients are those of that one."""
    n = len(call(op, sample))
    if n == 1:
        return "one result"

    def one(i):
        s, leaves = with_grad(op, sample)
        outputs = call(op, s)
        return gradients(outputs[i : i + 1], leaves, cotangents(outputs)[i : i + 1]) if outputs[i].requires_grad else ()

    for i in range(n):
        with use_reference():
            expected = one(i)
        for a, b in zip(one(i), expected):
            close(f"gradient of output {i} alone", a, b, *loosely(b))


@declare(*ONE)
def backward_twice_and_bits(op, sample):
    """retain_graph: the same bits; a new call: the same bits; 1 and 2 threads: the same bits (not of ATen's matrix products)."""
    s, leaves = with_grad(op, sample)
    outputs = call(op, s)
    cotangent = cotangents(outputs)
    first = dict(zip([f"gradient of {k}" for k in leaves], gradients(outputs, leaves, cotangent, retain_graph=True)))
    first = {k: g.clone() for k, g in first.items()}
    assert_same_bits(gradients(outputs, leaves, cotangent), first, "the second backward: ")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2) if not op.gemm else (threads,):
            torch.set_num_threads(n)
            assert_same_bits(list(run(op, sample, cotangent).values())[len(outputs) :], first, f"a new call on {n} threads: ")
    finally:
        torch.set_num_threads(threads)


@declare(*ONE)
def interleaved_calls(op, sample):
    """Each call has its own context: two forwards, then their backwards, give what each gives alone."""
    samples = [sample, beside(sample, 1, 0.1, keep=True)]
    cotangent = cotangents(call(op, sample))
    alone = [run(op, s, cotangent) for s in samples]
    held = []
    for s in samples:
        s, leaves = with_grad(op, s)
        held.append((call(op, s), leaves))
    for (outputs, leaves), expected in zip(held, alone):
        assert_same_bits((*outputs, *gradients(outputs, leaves, cotangent)), expected, "beside another call: ")


# --- what belongs to the caller --------------------------------------------------------------------------------------------------


@declare((F32, F32), (BF16, F32))
def nothing_of_the_caller_changes(op, sample):
    """Arguments and incoming gradients keep their values and version counters, results are not written to by the backward."""
    s, leaves = with_grad(op, sample)
    watched = {f"argument {k}": v for k, v in tensors(s).items()}

    def note(more):
        return {k: (t, t.detach().clone(), t._version) for k, t in more.items()}

    def unchanged(known, by):
        for k, (t, value, version) in known.items():
            assert same_bits(t.detach(), value), f"{k} was changed by the {by}"
            assert t._version == version, f"{k} was written to by the {by} (its version counter moved)"

    known = note(watched)
    outputs = call(op, s)
    unchanged(known, "forward")
    cotangent = cotangents(outputs)
    known |= note({f"incoming gradient {i}": g for i, g in enumerate(cotangent)} | {f"output {i}": y for i, y in enumerate(outputs)})
    gradients(outputs, leaves, cotangent, retain_graph=True)
    gradients(outputs, leaves, cotangent)
    unchanged(known, "backward")


@declare(*ONE)
def changes_after_the_forward(op, sample):
    """An argument or result that is written to before the backward: torch's error, or the right gradient; never a wrong one."""
    cotangent = cotangents(call(op, sample))
    expected = run(op, sample, cotangent)
    expected = {k: v for k, v in expected.items() if k.startswith("gradient")}
    for k in [*tensors(sample), *range(len(cotangent))]:
        s, leaves = with_grad(op, Sample("", sample.kwargs | ({k: sample.kwargs[k].clone()} if isinstance(k, str) else {})))
        outputs = call(op, s)
        t = s.kwargs[k] if isinstance(k, str) else outputs[k]
        if 0 in t.stride():
            continue  # torch writes to no such tensor
        with torch.no_grad():
            t.mul_(2).add_(1) if t.is_floating_point() else t.copy_(t.roll(1))
        try:
            found = gradients(outputs, leaves, cotangent)
        except RuntimeError as error:
            assert "inplace" in str(error), str(error)  # torch's word, by the version counter or for a view
            continue
        assert_same_bits(found, expected, f"{k if isinstance(k, str) else f'output {k}'} was changed before the backward: ")


@declare(*ONE)
def results_leave_nothing_behind(op, sample):
    """The graph of a dead result dies with it, and its inputs: no cycle or cache keeps a context, and its tensors, alive."""
    s, leaves = with_grad(op, sample)
    enabled = gc.isenabled()
    gc.disable()
    try:
        outputs = call(op, s)
        held = {f"argument {k}": weakref.ref(t) for k, t in leaves.items()}
        held |= {f"the context of {n.name()}": weakref.ref(n) for n in functions_of(outputs)}
        del outputs, s, leaves
        for k, reference in held.items():
            assert reference() is None, f"{k} is kept alive after the results are dead"
    finally:
        if enabled:
            gc.enable()


# --- transforms and forward mode ---------------------------------------------------------------------------------------------------


class Transformable:
    """A call as a function of its differentiable arguments, and a scalar loss of it."""

    def __init__(self, op, sample):
        self.op, self.kwargs, self.keys = op, sample.kwargs, diffable(op, sample)
        self.every = tuple(range(len(self.keys)))
        make = Make(F64, device=rows_of(sample)[1].device, seed=3)
        self.tangents = tuple(make(*v.shape) for v in self.values)
        self.reason = INFINITE if not finite(op, sample) else None if self.keys and self.kwargs[self.keys[0]].numel() else "no elements"

    @property
    def values(self):  # copies: a call may write to them
        return tuple(self.kwargs[k].clone(memory_format=torch.contiguous_format) for k in self.keys)

    @property
    def batches(self):
        return tuple(torch.stack([v, v * 0.5, v + 0.25]) for v in self.values)

    def __call__(self, *values):
        return call(self.op, Sample("", self.kwargs | dict(zip(self.keys, values))))

    def loss(self, *values):
        return sum(y.square().sum() for y in self(*values))

    def like_the_reference(self, transform, what):
        try:
            with use_reference():
                expected = _pytree.tree_leaves(transform())
        except Exception as error:
            raise NotApplicable(f"the reference does not do that: {type(error).__name__}") from error
        found = _pytree.tree_leaves(transform())
        for a, b in zip(found, expected):
            close(what, a, b, 1e-9)
        return found


@declare(*DOUBLE)
def jvp(op, sample):
    """torch.func.jvp equals the reference's, and the difference quotient."""
    f = Transformable(op, sample)
    if f.reason is None:
        found = f.like_the_reference(lambda: torch.func.jvp(f, f.values, f.tangents)[1], "jvp")
        eps = 1e-6
        ahead, behind = (f(*(v + e * t for v, t in zip(f.values, f.tangents))) for e in (eps, -eps))
        for a, y, z in zip(found, ahead, behind):
            close("jvp against a difference quotient", a, (y - z) / (2 * eps), 1e-5)
    return f.reason


@declare(*DOUBLE)
def vmap(op, sample):
    """torch.func.vmap over a batch of all arguments equals the reference's."""
    f = Transformable(op, sample)
    if f.reason is None:
        f.like_the_reference(lambda: torch.func.vmap(f, randomness="same")(*f.batches), "vmap")
    return f.reason


@declare(*DOUBLE)
def per_sample_gradients(op, sample):
    """vmap(grad(loss)) equals the reference's, and grad(loss) what autograd gives."""
    f = Transformable(op, sample)
    if f.reason is None:
        grad = torch.func.grad(f.loss, argnums=f.every)
        f.like_the_reference(lambda: torch.func.vmap(grad, randomness="same")(*f.batches), "vmap(grad)")
        leaves = tuple(v.requires_grad_() for v in f.values)
        for a, b in zip(f.like_the_reference(lambda: grad(*f.values), "grad"), torch.autograd.grad(f.loss(*leaves), leaves)):
            close("grad against autograd", a, b, 1e-10)
    return f.reason


@declare(*DOUBLE)
def hessian(op, sample):
    """jacfwd(jacrev(loss)) equals the reference's."""
    f = Transformable(op, sample)
    if f.reason is None and sum(v.numel() for v in f.values) > 400:
        return "more than 400 elements"
    if f.reason is None:
        second = torch.func.jacfwd(torch.func.jacrev(f.loss, argnums=f.every), argnums=f.every, randomness="same")
        f.like_the_reference(lambda: second(*f.values), "hessian")
    return f.reason


@declare(*DOUBLE)
def forward_mode(op, sample):
    """Dual inputs; and a dual cotangent over a forward that was made before the level was opened."""
    if not finite(op, sample):
        return INFINITE
    s, leaves = with_grad(op, sample)
    outputs = call(op, s)
    make = Make(F64, device=outputs[0].device, seed=5)
    cotangent, tangent = cotangents(outputs), tuple(make(*y.shape) for y in outputs)
    along = gradients(outputs, leaves, tangent, retain_graph=True)
    with forward_ad.dual_level():
        dual = tuple(forward_ad.make_dual(g, t) for g, t in zip(cotangent, tangent))
        grads = gradients(outputs, leaves, dual)
        for k, g, expected in zip(leaves, grads, along):
            # The backward is linear in its cotangent: the tangent is the gradient along the cotangent's tangent.
            found = forward_ad.unpack_dual(g).tangent
            close(f"tangent of the gradient of {k}", torch.zeros_like(g) if found is None else found, expected, 1e-9)
    if not leaves or not op.true_gradient:
        return None
    k, kwargs = next(iter(leaves)), sample.kwargs
    direction = make(*leaves[k].shape)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(kwargs[k].contiguous(), direction)
        pushed = [forward_ad.unpack_dual(y).tangent for y in call(op, Sample("", kwargs | {k: dual}))]
    s, leaves = with_grad(op, sample)
    pulled = gradients(call(op, s), leaves, cotangent)[0]
    total = sum(((p * g).sum() for p, g in zip(pushed, cotangent) if p is not None), torch.zeros_like(pulled).sum())  # None: no dependence
    close(f"tangents along {k}, against its gradient", total, (pulled * direction).sum(), 1e-9)


@declare(*DOUBLE)
def batched_cotangents(op, sample):
    """is_grads_batched and jacobian(vectorize=True) give the rows one by one."""
    s, leaves = with_grad(op, sample)
    outputs = call(op, s)
    batch = [cotangents(outputs, seed) for seed in range(3)]
    stacked = tuple(torch.stack(parts) for parts in zip(*batch))
    found = gradients(outputs, leaves, stacked, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(batch):
        for k, a, b in zip(leaves, found, gradients(outputs, leaves, cotangent, retain_graph=True)):
            close(f"batched gradient of {k}", a[i], b, 1e-9)
    if sum(t.numel() for t in leaves.values()) <= 400 and outputs[0].numel():
        keys, kwargs = list(leaves), sample.kwargs

        def f(*values):
            return call(op, Sample("", kwargs | dict(zip(keys, values))))

        one, many = (_pytree.tree_leaves(jacobian(f, tuple(t.clone() for t in leaves.values()), vectorize=v)) for v in (False, True))
        for a, b in zip(many, one):
            close("jacobian(vectorize=True)", a, b, 1e-9)


@declare(*ONE)
def lazy_bits(op, sample):
    """A tensor whose sign is a bit (imag of a conjugate), and a zero tensor that has no memory, as input and as cotangent."""
    keys, kwargs = diffable(op, sample), sample.kwargs

    def negated(t):
        return torch.complex(torch.zeros_like(t), -t).conj().imag

    lazy = {k: negated(kwargs[k]) for k in keys}
    assert all(v.is_neg() and torch.equal(v, kwargs[k]) for k, v in lazy.items())
    cotangent = cotangents(call(op, sample))
    expected = run(op, Sample("", kwargs | {k: v.resolve_neg() for k, v in lazy.items()}), cotangent)
    found = [a.resolve_neg() for a in run(op, Sample("", kwargs | lazy), tuple(map(negated, cotangent))).values()]
    if op.layout_bits:
        assert_same_bits(found, expected, "negative bit: ")
    else:
        for (k, b), a in zip(expected.items(), found):
            close(f"negative bit: {k}", a, b, 1e-5)
    device = rows_of(sample)[1].device
    zeros = tuple(torch._efficientzerotensor(y.shape, dtype=y.dtype, device=device) for y in cotangent)
    for (k, b), a in zip(run(op, sample, tuple(torch.zeros_like(y) for y in cotangent)).items(), run(op, sample, zeros).values()):
        compare(f"zero tensor as incoming gradient: {k}", a, b, torch.zeros(b.shape, device=b.device))
    for k in keys[:1]:
        shape = kwargs[k].shape
        zero = call(op, Sample("", kwargs | {k: torch._efficientzerotensor(shape, device=device)}))
        for i, (a, b) in enumerate(zip(zero, call(op, Sample("", kwargs | {k: torch.zeros(shape, device=device)})))):
            compare(f"zero tensor as {k}: output {i}", a, b, torch.zeros(b.shape, device=b.device))


# --- the dispatcher, compile, memory, hooks ------------------------------------------------------------------------------------------


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The calls of registered ops that are not torch's own."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in ("aten", "prim", "prims", "profiler"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered_calls(op, sample):
    with Recorder() as recorder:
        run(op, sample)
    return recorder.calls


@declare((F32, F32), (BF16, F32))
def opcheck(op, sample):
    """torch.library.opcheck of every registered op that a forward and a backward call."""
    calls = registered_calls(op, sample)
    for func, args, kwargs in calls:
        args, kwargs = _pytree.tree_map(lambda a: a.detach() if isinstance(a, torch.Tensor) else a, (args, kwargs))
        results = [y for y in _pytree.tree_leaves(func(*args, **kwargs)) if y is not None]
        utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not any(y.isnan().any() for y in results):  # its comparison takes NaN for unequal to itself
            utils.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(func, args, kwargs, test_utils=utils)
    return None if calls else "no op of torch.library is called"


def compile_and_compare(op, samples, **options):
    torch._dynamo.reset()
    compiled = torch.compile(lambda kwargs: op.functional(**kwargs), fullgraph=True, **options)
    for sample in samples:
        cotangent = cotangents(call(op, sample))
        s, leaves = with_grad(op, sample)
        torch.manual_seed(17)
        with torch._inductor.config.patch(fallback_random=True):  # to draw what eager draws
            outputs = compiled(s.kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (k, a), b in zip(run(op, sample, cotangent).items(), (*outputs, *gradients(outputs, leaves, cotangent))):
            close(f"compiled: {k}", b, a, 1e-5, scale=0.1)


def compile_without_gradients(op, sample):
    """Of tensors that require none, and of those that do under no_grad: Dynamo has ways of its own through a Function for them."""
    compiled = torch.compile(lambda kwargs: op.functional(**kwargs), fullgraph=True, backend="eager")
    torch.manual_seed(17)
    expected = call(op, sample)
    for given, wanted in ((sample, True), (with_grad(op, sample)[0], False)):
        torch.manual_seed(17)
        with torch.set_grad_enabled(wanted):
            found = compiled(given.kwargs)
        for a, b in zip(found if isinstance(found, tuple) else (found,), expected):
            close("compiled without gradients", a, b, 1e-5, scale=0.1)


@declare(*ONE, variants=(False, True))
def compile_fullgraph(op, sample, dynamic):
    """torch.compile(fullgraph=True), static and dynamic, and where no gradient is wanted: the values and gradients of eager mode."""
    compile_and_compare(op, [sample], backend="aot_eager", dynamic=dynamic)
    if not dynamic:
        compile_without_gradients(op, sample)


@declare(*ONE, variants=(False, True))
def checkpoint_and_saved_tensor_hooks(op, sample, reentrant):
    """Both kinds of activation checkpointing and save_on_cpu: the same bits."""
    cotangent = cotangents(call(op, sample))
    expected = run(op, sample, cotangent)

    def through(outer):
        s, leaves = with_grad(op, sample)
        outputs = outer(lambda *values: call(op, Sample("", s.kwargs | dict(zip(leaves, values)))), *leaves.values())
        if not reentrant:
            return (*outputs, *gradients(outputs, leaves, cotangent))
        torch.autograd.backward(outputs, cotangent)
        return (*outputs, *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves.values()))

    def hooked(f, *values):
        with torch.autograd.graph.save_on_cpu():
            return f(*values)

    for outer in (lambda f, *v: checkpoint(f, *v, use_reentrant=reentrant), hooked):
        assert_same_bits(through(outer), expected, "checkpointed or saved elsewhere: ")


@declare(*ONE)
def hooks(op, sample):
    """A hook on a result may replace its gradient; hooks on inputs, and full backward hooks of a module around the call, see what is
    right; `.grad` adds up over two backwards of one graph."""
    s, leaves = with_grad(op, sample)
    seen, around = {}, []
    layer = torch.nn.Module()
    layer.forward = lambda *values: call(op, Sample("", s.kwargs | dict(zip(leaves, values))))
    layer.register_full_backward_hook(lambda _, grad_inputs, grad_outputs: around.append(grad_inputs))
    outputs = layer(*leaves.values())
    cotangent = cotangents(outputs)
    expected = run(op, sample, tuple(2 * g for g in cotangent))
    expected = {k: expected[f"gradient of {k}"] for k in leaves}
    for k, leaf in leaves.items():
        leaf.register_hook(lambda g, k=k: seen.update({k: g.clone()}))
    used = [(y, g) for y, g in zip(outputs, cotangent) if y.requires_grad]
    for y, _ in used:
        y.register_hook(lambda g: 2 * g)
        y.retain_grad()
    for times in (1, 2):
        torch.autograd.backward(*map(list, zip(*used)), retain_graph=True)
        for y, g in used:
            close("gradient that a result retains", y.grad, 2 * g * times, 1e-6)
        for i, (k, leaf) in enumerate(leaves.items()):
            zero = torch.zeros_like(leaf)
            close(f"gradient that a hook on {k} sees", seen.get(k, zero), expected[k], 1e-5)
            close(f"gradient of {k} that a module's hook sees", zero if around[-1][i] is None else around[-1][i], expected[k], 1e-5)
            close(f"{k}.grad after {times} backward", zero if leaf.grad is None else leaf.grad, times * expected[k], 1e-5)


@declare((F32, F32), (BF16, BF16), (F16, F16), (F64, F64))
def autocast_dtype(op, sample):
    """Under autocast an op returns the dtype of torch's function (of the reference), and gradients in the dtypes of the inputs."""
    _, rows = rows_of(sample)
    with torch.autocast(rows.device.type, dtype=BF16):
        y, *_ = call(op, sample)
        expected = op.torch(**sample.kwargs) if op.torch else rows
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert y.dtype == expected.dtype, f"output 0: {y.dtype} under autocast, instead of {expected.dtype}"
    s, leaves = with_grad(op, sample)
    with torch.autocast(rows.device.type, dtype=BF16):
        outputs = call(op, s)
    for (k, leaf), g in zip(leaves.items(), gradients(outputs, leaves, cotangents(outputs))):
        assert g.dtype == leaf.dtype, f"gradient of {k}: {g.dtype} instead of {leaf.dtype}"


@declare((F32, F32), (F16, F16))
def meta_device(op, sample):
    """On meta tensors: the shapes and dtypes of a real call."""
    meta = Sample("", sample.kwargs | {k: v.to("meta") for k, v in tensors(sample).items()})
    for i, (y, m) in enumerate(zip(call(op, sample), call(op, meta))):
        found, expected = (m.shape, m.dtype, m.device.type), (y.shape, y.dtype, "meta")
        assert found == expected, f"output {i}: {found} instead of {expected}"
