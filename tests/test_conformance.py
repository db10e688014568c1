"""Every property of the contract × every op of the table × its samples × dtypes: those that any op can have are fusegrad.testing's,
those that only the table knows of are here."""

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fusegrad
from fusegrad._op import OPS, Sample
from fusegrad._samples import LAYOUTS, lay_out
from fusegrad.testing import properties
from fusegrad.testing.properties import same_bits
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


def holds(*which, rotating=False):
    """The test that these properties of fusegrad.testing hold for each op and sample, in the dtypes that show them."""

    @each(*properties.PROPERTIES[which[0].__name__].pairs, rotating=rotating)
    def test(case):
        for holds in which:
            holds(*drawn(case))

    return test


# --- values and first gradients ------------------------------------------------------------------------------------------------


@each(*PAIRS)
def test_values_and_gradients(case):
    properties.values_and_gradients(*drawn(case))
    assert not fusegrad.stats()


@pytest.mark.parametrize("layout", LAYOUTS)
@each((F32, F32))
def test_layouts(case, layout):
    properties.layouts(*drawn(case), layout)


@each_op
def test_sizes(op):
    sample = draw(op, names(op)[0])
    for rows in (0, 1, 3):
        properties.sizes(op, sample, rows)


@pytest.mark.parametrize(
    "rows, dtype", ((0, F32), (1, F32), (2, F32), (65_535, F32), (65_536, F32), (65_537, F32), (65_536, BF16)), ids=str
)
@each_op
def test_many_rows(op, rows, dtype):
    """Of bfloat16: a parameter's gradient is right to the half ulp that rounding takes, so its sum was not taken in 16 bits."""
    properties.values_and_gradients(op, Sample(str(rows), op.bench(Make(dtype), rows, 9)))


@pytest.mark.parametrize("cols", (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 255, 513, 8191, 131_072, 262_144))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_op
def test_row_lengths(op, cols, dtype):
    properties.values_and_gradients(op, Sample(str(cols), op.bench(Make(dtype), 3, cols)))


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


@pytest.mark.parametrize("value", properties.SPECIAL)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_op
def test_special_values(op, value, dtype):
    assert properties.special_values(op, Sample("special", op.bench(Make(dtype), 5, 37)), value) is None


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


@each_op
def test_torch_takes_some_samples(op):
    """So that the test above compares something."""

    def takes(sample):
        try:
            return op.torch(**sample.kwargs) is not None
        except (TypeError, RuntimeError):
            return False

    assert op.torch is None or any(takes(draw(op, n)) for n in names(op))


# --- orders of derivative --------------------------------------------------------------------------------------------------------


test_gradcheck = holds(properties.gradcheck)
test_gradgradcheck = holds(properties.gradgradcheck)
test_gradient_penalty = holds(properties.gradient_penalty)
test_subsets_of_requires_grad = holds(properties.subsets_of_requires_grad)
test_backward_twice_and_bits = holds(properties.backward_twice_and_bits)


@each_op
def test_what_the_caller_may_do(op):
    """All samples in one test: each takes less time than a test does."""
    for sample in names(op):
        for holds in (
            properties.interleaved_calls,
            properties.changes_after_the_forward,
            properties.hooks,
            properties.unneeded_gradients,
            properties.unused_results,
        ):
            holds(op, draw(op, sample))


@each_op
def test_bits_do_not_depend_on_threads(op):
    sample = Sample("large", op.bench(Make(), 1000, 257))
    cotangent = cotangents(call(op, sample))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 2, 3) if not op.gemm else (2, 2, 2):
            torch.set_num_threads(n)
            found.append(run(op, sample, cotangent))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0].values(), other.values()))


test_nothing_of_the_caller_changes = holds(properties.nothing_of_the_caller_changes)
test_func_transforms = holds(properties.jvp, properties.vmap, properties.per_sample_gradients, properties.hessian)
test_forward_mode = holds(properties.forward_mode)
test_batched_cotangents = holds(properties.batched_cotangents)
test_lazy_bits = holds(properties.lazy_bits)


# --- the dispatcher, compile, export ---------------------------------------------------------------------------------------------


@each((F32, F32), (BF16, F32), rotating=True)
def test_opcheck(case):
    op, sample = drawn(case)
    called = {func._schema.name.removeprefix("fusegrad::") for func, *_ in properties.registered_calls(op, sample)}
    called -= {"linear_product"}  # torch's, no kernel
    assert called == set(op.kernels) or (op.gemm and called <= set(op.kernels))
    properties.opcheck(op, sample)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@each((F32, F32), rotating=True)
def test_compile(case, dynamic):
    properties.compile_fullgraph(*drawn(case), dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@each_op
def test_compile_inductor(op, dynamic):
    samples = [Sample(str(n), op.bench(Make(seed=n), n, 40)) for n in ((6, 10, 23) if dynamic else (6,))]
    properties.compile_and_compare(op, samples, dynamic=dynamic)


@each_op
def test_no_recompilation_for_a_second_length(op):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda kwargs: op.functional(**kwargs), backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 9, 31):
        compiled(op.bench(Make(), n, 24))
    assert counter.frame_count == 1


def kernels_in(graph):
    return [str(n.target) for n in graph.nodes if n.op == "call_function" and "fusegrad" in str(n.target)]


@each_op
def test_compile_calls_the_kernels(op):
    """Not the reference, forward and backward."""
    found = []

    def keep(module, _):
        found.extend(kernels_in(module.graph))
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(lambda kwargs: op.functional(**kwargs), backend=backend, fullgraph=True)
    s, leaves = with_grad(op, Sample("", op.bench(Make(), 6, 32)))
    outputs = compiled(s.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, list(leaves.values()), cotangents(outputs))
    assert set(found) == {f"fusegrad.{kernel}.default" for kernel in op.kernels}


@each_op
def test_export_keeps_one_named_op(op):
    kwargs = op.bench(Make(), 6, 32)

    class Model(torch.nn.Module):
        def forward(self, **kwargs):
            return op.functional(**kwargs)

    program = torch.export.export(Model(), (), kwargs)
    assert kernels_in(program.graph) == [f"fusegrad.{kernel}.default" for kernel in op.kernels if kernel.endswith("_fwd")]
    torch.manual_seed(17)
    found = program.module()(**kwargs)
    for a, b in zip(found if isinstance(found, tuple) else (found,), call(op, Sample("", kwargs))):
        assert same_bits(a, b)


@pytest.mark.parametrize("reentrant", (False, True), ids=("nonreentrant", "reentrant"))
@each((F32, F32))
def test_checkpoint_and_saved_tensor_hooks(case, reentrant):
    properties.checkpoint_and_saved_tensor_hooks(*drawn(case), reentrant)


# --- dtypes and memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=name_of)
@each_op
def test_autocast_dtype(op, dtype):
    properties.autocast_dtype(op, Sample("", op.bench(Make(dtype), 4, 16)))


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


@pytest.mark.parametrize("layout", ("contiguous", "row_strided", "transposed", "expanded", "offset", "packed_heads"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_op
def test_no_allocation_beyond_the_outputs(op, dtype, layout):
    sample = laid_out(Sample("", op.bench(Make(dtype), 256, 512)), layout)
    kwargs, shape = sample.kwargs, next(iter(sample.kwargs.values())).shape
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
    cotangent = [lay_out(g, layout) if g.shape == shape else g for g in cotangents(held)]
    inputs = list(leaves.values())
    backward_bytes = allocated(lambda: torch.autograd.grad(held, inputs, cotangent, retain_graph=True))
    slices = 256 // 16 if DEVICE == "cpu" else 256  # on a GPU as many blocks as it has place for
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
    properties.results_leave_nothing_behind(op, Sample("", op.bench(Make(), 8, 16)))


@each_op
def test_node_name(op):
    sample, _ = with_grad(op, Sample("", op.bench(Make(), 4, 8)))
    assert call(op, sample)[0].grad_fn.name() == f"{op.fn.__name__}Backward"


# --- the table -------------------------------------------------------------------------------------------------------------------


test_meta_device = holds(properties.meta_device)


def test_table_is_worth_its_name():
    """At least 12 samples an op, never all contiguous, and each option in at least two of them at another value than its default."""
    import inspect

    elsewhere = {
        *((op.name, option) for op in ops for option in ("size_average", "reduce")),  # torch's old names, tested by themselves
        ("dropout", "training"),  # test_dropout.py::test_modules_as_torch
        ("dropout", "inplace"),  # test_dropout.py::test_inplace
        ("normalize", "p"),  # test_norms.py::test_other_exponents_go_through_the_reference
        ("normalize", "out"),  # test_norms.py::test_out
        ("vocab_parallel_cross_entropy", "group"),  # test_vocab_parallel.py::test_two_processes
    }

    def is_set(sample, option):
        value = sample.kwargs.get(option.name, option.default)
        return isinstance(value, torch.Tensor) or value != option.default

    for op in ops:
        drawn = [draw(op, n) for n in names(op)]
        assert len(drawn) >= 12, op.name
        assert sum(not all(t.is_contiguous() for t in tensors(s).values()) for s in drawn) >= 3, op.name
        for option in inspect.signature(op.functional).parameters.values():
            if (op.name, option.name) not in elsewhere:
                assert sum(is_set(s, option) for s in drawn) >= 2, f"{op.name}: {option.name}"
