"""Every property of the contract × every op of the table × its samples × dtypes."""

import gc
import weakref

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

import fusegrad
from fusegrad._op import OPS, Sample
from fusegrad._samples import LAYOUTS, lay_out
from table import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    PAIRS,
    Make,
    call,
    cases,
    check,
    cotangents,
    diffable,
    draw,
    ids,
    laid_out,
    name_of,
    names,
    run,
    subsets,
    tensors,
    with_grad,
)

ops = list(OPS.values())
each_op = pytest.mark.parametrize("op", ops, ids=lambda op: op.name)


def in_turns(params):
    return [pytest.param(p, marks=pytest.mark.rotating(i % 3)) for i, p in enumerate(params)]


def each(*pairs, rotating=False):
    found = list(cases(*pairs))
    return pytest.mark.parametrize("case", in_turns(found) if rotating else found, ids=ids)


def drawn(case, **kwargs):
    op, name, dtype, param = case
    return op, draw(op, name, dtype, param, **kwargs)


def bits(t):
    return t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def flat(results):
    return [t for t in results.values()] if isinstance(results, dict) else list(results)


# --- values and first gradients ------------------------------------------------------------------------------------------------


@each(*PAIRS)
def test_values_and_gradients(case):
    op, sample = drawn(case)
    cotangent = cotangents(call(op, sample))
    check(op, sample, run(op, sample, cotangent), cotangent)
    assert not fusegrad.stats()


@pytest.mark.parametrize("layout", LAYOUTS)
@each((F32, F32))
def test_layouts(case, layout):
    """Inputs and incoming gradients in every layout; on the CPU with the bits of the contiguous ones, if the op says so."""
    op, sample = drawn(case)
    sample = laid_out(sample, layout)
    cotangent = tuple(lay_out(g, layout) for g in cotangents(call(op, sample)))
    found = run(op, sample, cotangent)
    if DEVICE == "cpu" and op.layout_bits:
        dense = Sample(sample.name, {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()})
        for (k, a), b in zip(found.items(), run(op, dense, tuple(g.contiguous() for g in cotangent)).values()):
            assert same_bits(a, b), k
    else:
        check(op, sample, found, cotangent)


@pytest.mark.parametrize(
    "rows, dtype", ((0, F32), (1, F32), (2, F32), (65_535, F32), (65_536, F32), (65_537, F32), (65_536, BF16)), ids=str
)
@each_op
def test_many_rows(op, rows, dtype):
    """Of bfloat16: a parameter's gradient is right to the half ulp that rounding takes, so its sum was not taken in 16 bits."""
    sample = Sample(str(rows), op.bench(Make(dtype), rows, 9))
    cotangent = cotangents(call(op, sample))
    check(op, sample, run(op, sample, cotangent), cotangent)


@pytest.mark.parametrize("cols", (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 255, 513, 8191, 131_072, 262_144))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_op
def test_row_lengths(op, cols, dtype):
    sample = Sample(str(cols), op.bench(Make(dtype), 3, cols))
    cotangent = cotangents(call(op, sample))
    check(op, sample, run(op, sample, cotangent), cotangent)


@each_op
def test_beyond_2_to_31_elements(op):
    """Rows so far apart that 32-bit offsets overflow, on memory that is never touched in between."""
    kwargs = op.bench(Make(F16), 3, 40)
    main = next(iter(kwargs))
    shape, (_, *strides) = kwargs[main].shape, kwargs[main].stride()
    far = torch.empty(2**31 + 200, dtype=F16, device=DEVICE).as_strided(shape, (2**30, *strides)).copy_(kwargs[main])
    cotangent = cotangents(call(op, Sample("near", kwargs)))
    near, result = run(op, Sample("near", kwargs), cotangent), run(op, Sample("far", kwargs | {main: far}), cotangent)
    if not op.layout_bits:
        check(op, Sample("near", kwargs), result, cotangent)
        return
    for (k, a), b in zip(near.items(), result.values()):
        assert same_bits(a, b), k


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-30, 1e-42, 0.0))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_op
def test_special_values(op, value, dtype):
    """One odd element in the first row, a whole odd row, and rows beside them that must not notice."""
    kwargs = op.bench(Make(dtype), 5, 37)
    main = next(iter(kwargs))
    kwargs[main][0, 3] = value
    kwargs[main][2] = value
    sample = Sample("special", kwargs)
    cotangent = cotangents(call(op, sample))
    check(op, sample, run(op, sample, cotangent), cotangent)


@each(*PAIRS[1:])
def test_like_torch(case):
    """Where torch has the function: its dtype, shape and, within rounding of that dtype, its values."""
    op, sample = drawn(case)
    if op.torch is None:
        return
    try:
        expected = op.torch(**sample.kwargs)
    except (TypeError, RuntimeError):  # options or dtypes of ours that torch does not have
        return
    if expected is None:
        return
    (y,) = call(op, sample)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    eps = torch.finfo(y.dtype).eps
    if op.random:  # torch draws otherwise
        return
    torch.testing.assert_close(
        y, expected, rtol=8 * eps, atol=8 * eps * max(1.0, expected.nan_to_num().abs().max().item() if y.numel() else 1), equal_nan=True
    )


# --- orders of derivative --------------------------------------------------------------------------------------------------------


def differentiable_call(case):
    """f(*leaves) and the leaves, dense float64. Samples with an infinite or undefined value have no derivative to check."""
    op, sample = drawn(case)
    keys = diffable(op, sample)
    leaves = [sample.kwargs[k].detach().clone(memory_format=torch.contiguous_format).requires_grad_() for k in keys]
    layouts = [sample.kwargs[k] for k in keys]

    def f(*values):
        placed = {}
        for k, v, like in zip(keys, values, layouts):
            # The same strides as the sample's tensor, by a differentiable copy, where they do not overlap.
            placed[k] = v if 0 in like.stride() else torch.empty_strided(like.shape, like.stride(), dtype=v.dtype).copy_(v) if (
                type(v) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(v)) else v  # fmt: skip
        out = call(op, Sample("", sample.kwargs | placed))
        return tuple(y for y in out if y.isfinite().all()) if len(out) > 1 else out[0]

    finite = all(y.isfinite().all() for y in call(op, sample))
    return f, leaves, finite and sum(t.numel() for t in leaves) > 0


@each((F64, F64))
def test_gradcheck(case):
    f, leaves, meaningful = differentiable_call(case)
    if meaningful and case[0].true_gradient:
        fast = sum(t.numel() for t in leaves) > 200
        assert torch.autograd.gradcheck(f, leaves, fast_mode=fast)


@each((F64, F64))
def test_gradgradcheck(case):
    f, leaves, meaningful = differentiable_call(case)
    if meaningful:
        fast = sum(t.numel() for t in leaves) > 60
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=fast)


@each((F64, F64), (F32, F32))
def test_gradient_penalty(case):
    """A loss plus the squared norm of its gradient, as in WGAN-GP: equal to the reference."""
    op, sample = drawn(case)
    if not all(y.isfinite().all() for y in call(op, sample)):
        return
    cotangent = cotangents(call(op, sample))

    def penalty():
        s, leaves = with_grad(op, sample)
        outputs = call(op, s)
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangent, create_graph=True)
        loss = sum((y * g).sum() for y, g in zip(outputs, cotangent)) + sum(g.square().sum() for g in grads)
        return torch.autograd.grad(loss, list(leaves.values()))

    ours = penalty()
    assert ("the backward is differentiated") in {reason for _, reason in fusegrad.stats()}
    with fusegrad.use_reference():
        expected = penalty()
    for a, b in zip(ours, expected):  # of sums: what is left of large terms is as exact as they are
        tolerance = 1e-4 if a.dtype == F32 else 1e-9
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max([1.0, *b.abs().flatten().tolist()]))


@each((F32, F32))
def test_subsets_of_requires_grad(case):
    op, sample = drawn(case)
    cotangent = cotangents(call(op, sample))
    full = run(op, sample, cotangent)
    for which in subsets(diffable(op, sample)):
        for k, v in run(op, sample, cotangent, which).items():
            assert same_bits(v, full[k]), (which, k)


@each((F32, F32))
def test_backward_twice_and_bits(case):
    """retain_graph: the same bits; a new call: the same bits; 1 and 2 threads: the same bits (not of ATen's matrix products)."""
    op, sample = drawn(case)
    s, leaves = with_grad(op, sample)
    outputs = call(op, s)
    cotangent = cotangents(outputs)
    first = torch.autograd.grad(outputs, list(leaves.values()), cotangent, retain_graph=True)
    second = torch.autograd.grad(outputs, list(leaves.values()), cotangent)
    assert all(same_bits(a, b) for a, b in zip(first, second))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2) if not op.gemm else (threads,):
            torch.set_num_threads(n)
            again = run(op, sample, cotangent)
            assert all(same_bits(a, b) for a, b in zip(flat(again)[len(outputs) :], first)), f"{n} threads"
    finally:
        torch.set_num_threads(threads)


@each_op
def test_bits_do_not_depend_on_threads(op):
    sample = Sample("large", op.bench(Make(), 1000, 257))
    cotangent = cotangents(call(op, sample))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 2, 3) if not op.gemm else (2, 2, 2):
            torch.set_num_threads(n)
            found.append(flat(run(op, sample, cotangent)))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other))


@each((F32, F32), (BF16, F32))
def test_nothing_of_the_caller_changes(case):
    op, sample = drawn(case)
    s, leaves = with_grad(op, sample)
    watched = list(tensors(s).values())
    outputs = call(op, s)
    cotangent = cotangents(outputs)
    watched += list(cotangent)
    before = [(t.detach().clone(), t._version) for t in watched]
    kept = [y.detach().clone() for y in outputs]
    torch.autograd.grad(outputs, list(leaves.values()), cotangent, retain_graph=True)
    torch.autograd.grad(outputs, list(leaves.values()), cotangent)
    for t, (value, version) in zip(watched, before):
        assert t._version == version and same_bits(t.detach(), value)
    assert all(same_bits(y.detach(), k) for y, k in zip(outputs, kept))


@each((F64, F64))
def test_func_transforms(case):
    """jvp, vmap over a batch, vmap(grad) per sample, of all arguments and of the rows alone, hessian: equal to the reference under
    the same transform."""
    op, sample = drawn(case)
    if not all(y.isfinite().all() for y in call(op, sample)):
        return
    keys = diffable(op, sample)
    values = tuple(sample.kwargs[k].contiguous() for k in keys)
    if not values or not values[0].numel():
        return
    make = Make(F64, seed=3)
    tangents = tuple(make(*v.shape) for v in values)
    batches = tuple(torch.stack([v, v * 0.5, v + 0.25]) for v in values)

    def f(*values):
        return call(op, Sample("", sample.kwargs | dict(zip(keys, values))))

    def loss(*values):
        return sum(y.square().sum() for y in f(*values))

    every = tuple(range(len(keys)))
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=every), (0, *[None] * (len(keys) - 1)), randomness="same")

    def everything():
        yield from torch.func.jvp(f, values, tangents)[1]
        yield from torch.func.vmap(f, randomness="same")(*batches)
        yield from torch.func.vmap(torch.func.grad(loss, argnums=every), randomness="same")(*batches)
        yield from per_sample(batches[0], *values[1:])
        if sum(v.numel() for v in values) <= 400:
            hessian = torch.func.jacfwd(torch.func.jacrev(loss, argnums=every), argnums=every, randomness="same")
            for row in hessian(*values):
                yield from row
        yield from (g for g in torch.func.grad(loss, argnums=every)(*values))

    ours = list(everything())
    with fusegrad.use_reference():
        expected = list(everything())
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max([1.0, *b.nan_to_num().abs().flatten().tolist()]), equal_nan=True)
    # Against what needs no transform: the derivative along a direction, and the gradient.
    leaves = tuple(v.detach().clone().requires_grad_() for v in values)
    plain = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(ours[-len(keys) :], plain):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    eps = 1e-6
    numeric = [
        (a - b) / (2 * eps)
        for a, b in zip(f(*(v + eps * t for v, t in zip(values, tangents))), f(*(v - eps * t for v, t in zip(values, tangents))))
    ]
    for a, b in zip(ours, numeric):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each((F64, F64))
def test_forward_mode(case):
    """Dual inputs; and a dual cotangent over a forward that was made before the level was opened."""
    op, sample = drawn(case)
    if not all(y.isfinite().all() for y in call(op, sample)):
        return
    s, leaves = with_grad(op, sample)
    outputs = call(op, s)
    make = Make(F64, seed=5)
    cotangent, tangent = cotangents(outputs), tuple(make(*y.shape) for y in outputs)
    along = torch.autograd.grad(outputs, list(leaves.values()), tangent, retain_graph=True)
    with forward_ad.dual_level():
        dual = tuple(forward_ad.make_dual(g, t) for g, t in zip(cotangent, tangent))
        grads = torch.autograd.grad(outputs, list(leaves.values()), dual)
        for g, expected in zip(grads, along):
            # The backward is linear in its cotangent: the tangent is the gradient along the cotangent's tangent.
            torch.testing.assert_close(forward_ad.unpack_dual(g).tangent, expected, rtol=1e-9, atol=1e-9)
    if leaves:
        k = next(iter(leaves))
        direction = make(*leaves[k].shape)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(sample.kwargs[k].contiguous(), direction)
            pushed = [forward_ad.unpack_dual(y).tangent for y in call(op, Sample("", sample.kwargs | {k: dual}))]
        s, leaves = with_grad(op, sample)
        pulled = torch.autograd.grad(call(op, s), leaves[k], cotangent)[0]
        if op.true_gradient:
            total = sum((p * g).sum() for p, g in zip(pushed, cotangent) if p is not None)  # None: does not depend on k
            torch.testing.assert_close(total, (pulled * direction).sum(), rtol=1e-9, atol=1e-9)


@each((F64, F64))
def test_batched_cotangents(case):
    """is_grads_batched and jacobian(vectorize=True) give the rows one by one."""
    op, sample = drawn(case)
    s, leaves = with_grad(op, sample)
    outputs = call(op, s)
    batch = [cotangents(outputs, seed) for seed in range(3)]
    stacked = tuple(torch.stack(parts) for parts in zip(*batch))
    found = torch.autograd.grad(outputs, list(leaves.values()), stacked, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(batch):
        for a, b in zip(found, torch.autograd.grad(outputs, list(leaves.values()), cotangent, retain_graph=True)):
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-9, equal_nan=True)
    if sum(t.numel() for t in leaves.values()) <= 400 and outputs[0].numel():
        keys = list(leaves)

        def f(*values):
            return call(op, Sample("", sample.kwargs | dict(zip(keys, values))))

        one, many = (jacobian(f, tuple(leaves.values()), vectorize=v) for v in (False, True))
        for a, b in zip(torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(many)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@each((F32, F32))
def test_lazy_bits(case):
    """A tensor whose sign is a bit (imag of a conjugate), and a zero tensor that has no memory, as input and as cotangent."""
    op, sample = drawn(case)
    keys = diffable(op, sample)
    negated = {k: torch.complex(torch.zeros_like(sample.kwargs[k]), -sample.kwargs[k]).conj().imag for k in keys}
    assert all(v.is_neg() and torch.equal(v, sample.kwargs[k]) for k, v in negated.items())
    cotangent = cotangents(call(op, sample))
    dense = Sample("", sample.kwargs | {k: v.resolve_neg() for k, v in negated.items()})
    expected = run(op, dense, cotangent)
    lazy = tuple(torch.complex(torch.zeros_like(g), -g).conj().imag for g in cotangent)
    for (k, a), b in zip(run(op, Sample("", sample.kwargs | negated), lazy).items(), expected.values()):
        if op.layout_bits:
            assert same_bits(a.resolve_neg(), b), k
        else:
            torch.testing.assert_close(a.resolve_neg(), b, equal_nan=True)
    zeros = tuple(torch._efficientzerotensor(y.shape, dtype=y.dtype, device=DEVICE) for y in cotangent)
    dense_zeros = tuple(torch.zeros_like(y) for y in cotangent)
    for a, b in zip(run(op, sample, zeros).values(), run(op, sample, dense_zeros).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for k in keys[:1]:
        shape = sample.kwargs[k].shape
        zero = call(op, Sample("", sample.kwargs | {k: torch._efficientzerotensor(shape, device=DEVICE)}))
        for a, b in zip(zero, call(op, Sample("", sample.kwargs | {k: torch.zeros(shape, device=DEVICE)}))):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- the dispatcher, compile, export ---------------------------------------------------------------------------------------------


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The calls of registered ops; that a mode sees them at all is the gate's work."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusegrad":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@each((F32, F32), (BF16, F32))
def test_opcheck(case):
    op, sample = drawn(case)
    with Recorder() as recorder:
        run(op, sample)
    called = {func._schema.name.removeprefix("fusegrad::") for func, _ in recorder.calls}
    assert called == set(op.kernels) or (op.gemm and called <= set(op.kernels))
    for func, args in recorder.calls:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        results = [y for y in torch.utils._pytree.tree_leaves(func(*args)) if y is not None]
        utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not any(y.isnan().any() for y in results):  # its comparison takes NaN for unequal to itself
            utils.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(func, args, test_utils=utils)


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
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangent)
        for (k, a), b in zip(run(op, sample, cotangent).items(), (*outputs, *grads)):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@each((F32, F32), rotating=True)
def test_compile(case, dynamic):
    op, sample = drawn(case)
    compile_and_compare(op, [sample], backend="aot_eager", dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@each_op
def test_compile_inductor(op, dynamic):
    samples = [Sample(str(n), op.bench(Make(seed=n), n, 40)) for n in ((6, 10, 23) if dynamic else (6,))]
    compile_and_compare(op, samples, dynamic=dynamic)


@each_op
def test_no_recompilation_for_a_second_length(op):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda kwargs: op.functional(**kwargs), backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 9, 31):
        compiled(op.bench(Make(), n, 24))
    assert counter.frame_count == 1


@each_op
def test_export_keeps_one_named_op(op):
    kwargs = op.bench(Make(), 6, 32)

    class Model(torch.nn.Module):
        def forward(self, **kwargs):
            return op.functional(**kwargs)

    program = torch.export.export(Model(), (), kwargs)
    named = [n for n in program.graph.nodes if n.op == "call_function" and "fusegrad" in str(n.target)]
    assert [str(n.target) for n in named] == [f"fusegrad.{kernel}.default" for kernel in op.kernels if kernel.endswith("_fwd")]
    torch.manual_seed(17)
    found = program.module()(**kwargs)
    for a, b in zip(found if isinstance(found, tuple) else (found,), call(op, Sample("", kwargs))):
        assert same_bits(a, b)


@pytest.mark.parametrize("reentrant", (False, True), ids=("nonreentrant", "reentrant"))
@each((F32, F32))
def test_checkpoint_and_saved_tensor_hooks(case, reentrant):
    op, sample = drawn(case)
    cotangent = cotangents(call(op, sample))
    expected = run(op, sample, cotangent)

    def through(outer):
        s, leaves = with_grad(op, sample)
        outputs = outer(lambda *values: call(op, Sample("", s.kwargs | dict(zip(leaves, values)))), *leaves.values())
        return (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangent)) if not reentrant else backward(outputs, leaves)

    def backward(outputs, leaves):
        torch.autograd.backward(outputs, cotangent)
        return (*outputs, *(t.grad for t in leaves.values()))

    def hooked(f, *values):
        with torch.autograd.graph.save_on_cpu():
            return f(*values)

    for outer in (lambda f, *v: torch.utils.checkpoint.checkpoint(f, *v, use_reentrant=reentrant), hooked):
        for (k, a), b in zip(expected.items(), through(outer)):
            assert same_bits(a, b.detach()), k


# --- dtypes and memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=name_of)
@each_op
def test_autocast_dtype(op, dtype):
    """Under autocast an op returns the dtype of torch's function, and gradients in the dtypes of the inputs."""
    sample = Sample("", op.bench(Make(dtype), 4, 16))
    with torch.autocast(DEVICE, dtype=BF16):
        y, *_ = call(op, sample)
        expected = op.torch(**sample.kwargs).dtype if op.torch else dtype
    assert y.dtype == expected
    s, leaves = with_grad(op, sample)
    with torch.autocast(DEVICE, dtype=BF16):
        outputs = call(op, s)
    for leaf, g in zip(leaves.values(), torch.autograd.grad(outputs, list(leaves.values()), cotangents(outputs))):
        assert g.dtype == leaf.dtype


@each(*PAIRS)
def test_saved_bytes(case):
    """What the backward keeps alive is what the row says, each tensor counted once."""
    op, sample = drawn(case)
    s, _ = with_grad(op, sample)
    saved = {}

    def pack(t):
        saved[t.data_ptr(), t.shape, t.stride()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = call(op, s)
    if sample.kwargs.get("reduction", "mean") != "none" and s.kwargs[next(iter(s.kwargs))].numel() == 0:
        return
    assert sum(saved.values()) == op.saved_bytes(sample.kwargs), outputs


def intermediates(op, kwargs):
    """Bytes that are saved beside the arguments."""
    return max(0, op.saved_bytes(kwargs) - sum(t.nbytes for t in kwargs.values() if isinstance(t, torch.Tensor)))


def allocated(f):
    """Bytes that f asks the allocator for, one by one."""
    f()
    if DEVICE == "cuda":
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        f()
        return torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        f()
    events = profile.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


@pytest.mark.parametrize("layout", ("contiguous", "row_strided", "expanded", "offset", "packed_heads"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_op
def test_no_allocation_beyond_the_outputs(op, dtype, layout):
    kwargs = op.bench(Make(dtype), 256, 512)
    main = next(iter(kwargs))
    kwargs[main] = lay_out(kwargs[main], layout)
    sample = Sample("", kwargs)
    s, leaves = with_grad(op, sample)
    outputs = []
    small = 64 * 1024 + intermediates(op, kwargs)  # per-row and per-column values; the large tensors are half a MB and more

    def forward():
        outputs[:] = [y.detach() for y in call(op, sample)]

    forward_bytes = allocated(forward)
    small += op.workspace(kwargs)
    as_torch = op.gemm == "torch"  # a matrix product has copies and a workspace of its own
    torchs = allocated(lambda: op.torch(**kwargs)) if as_torch else 0
    assert forward_bytes <= max(torchs, sum(y.nbytes for y in outputs)) + small
    held = call(op, s)
    cotangent = cotangents(held)
    inputs = list(leaves.values())
    backward_bytes = allocated(lambda: torch.autograd.grad(held, inputs, cotangent, retain_graph=True))
    slices = 256 // (16 if DEVICE == "cpu" else 4)
    partial = slices * 512 * 4 * (len(inputs) - 1)  # the sums over each slice of rows, for each parameter
    if as_torch:
        y = op.torch(**s.kwargs)
        torchs = allocated(lambda: torch.autograd.grad(y, inputs, cotangent, retain_graph=True))
    assert backward_bytes <= max(torchs, sum(t.numel() * t.element_size() for t in inputs)) + partial + small


@each_op
def test_frozen_parameters_cost_nothing(op):
    sample = Sample("", op.bench(Make(), 256, 512))
    keys = diffable(op, sample)
    s, leaves = with_grad(op, sample, keys[:1])
    outputs = call(op, s)
    g = cotangents(outputs)
    asked = allocated(lambda: torch.autograd.grad(outputs, list(leaves.values()), g, retain_graph=True))
    assert asked <= leaves[keys[0]].nbytes + op.workspace(s.kwargs) + 8 * 1024 + intermediates(op, sample.kwargs)


@each_op
def test_calls_leave_nothing_behind(op):
    """The graph of a dead result dies with it: no cycle keeps a context, and its tensors, alive."""
    sample, _ = with_grad(op, Sample("", op.bench(Make(), 8, 16)))
    gc.disable()
    try:
        outputs = call(op, sample)
        node = weakref.ref(outputs[0].grad_fn)
        del outputs
        assert node() is None
    finally:
        gc.enable()


@each_op
def test_node_name(op):
    sample, _ = with_grad(op, Sample("", op.bench(Make(), 4, 8)))
    assert call(op, sample)[0].grad_fn.name() == f"{op.fn.__name__}Backward"


# --- the table -------------------------------------------------------------------------------------------------------------------


@each((F32, F32), (F16, F16))
def test_meta_device(case):
    op, sample = drawn(case)
    meta = Sample("", sample.kwargs | {k: v.to("meta") for k, v in tensors(sample).items()})
    for y, m in zip(call(op, sample), call(op, meta)):
        assert (y.shape, y.dtype, m.device.type) == (m.shape, m.dtype, "meta")


def test_table_is_worth_its_name():
    """At least 12 samples an op, never all contiguous, and each option in at least two of them."""
    import inspect

    for op in ops:
        drawn = [draw(op, n) for n in names(op)]
        assert len(drawn) >= 12, op.name
        assert sum(not all(t.is_contiguous() for t in tensors(s).values()) for s in drawn) >= 3, op.name
        options = [p.name for p in inspect.signature(op.functional).parameters.values()]
        for option in options:
            if option not in ("size_average", "reduce"):  # torch's old names, tested by themselves
                assert sum(option in s.kwargs for s in drawn) >= 2, f"{op.name}: {option}"
