"""What is peculiar to norms over channels: batches, running statistics, memory formats, numbers far from 0."""

import pytest
import torch
from test_conformance import allocated

import fusegrad
import fusegrad.functional as F
from fusegrad._op import OPS, Sample
from table import BF16, F32, F64, PAIRS, Make, call, check, cotangents, name_of, run

FORMATS = (torch.contiguous_format, torch.channels_last)
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=("nchw", "nhwc"))


def images(*shape, fmt=torch.contiguous_format, dtype=F32, seed=0):
    return Make(dtype, seed=seed)(*shape).to(memory_format=fmt)


@pytest.mark.parametrize("shape", ((1, 4), (1, 4, 1), (1, 4, 1, 1)))
def test_a_single_value_per_channel_raises(shape):
    for f in (F.batch_norm, torch.nn.functional.batch_norm):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            f(torch.randn(shape), None, None, training=True)
    for f in (F.group_norm, torch.nn.functional.group_norm):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            f(torch.randn(shape), 4)
    y = F.batch_norm(torch.randn(shape), torch.zeros(4), torch.ones(4))  # not in training
    assert y.shape == shape and y.isfinite().all()


def test_errors():
    x, c = torch.randn(2, 6, 4, 4), torch.zeros(6)
    with pytest.raises(ValueError, match="batch_norm: running_mean and running_var must be given when training is False, got None"):
        F.batch_norm(x, None, None)
    with pytest.raises(ValueError, match="batch_norm: running_mean and running_var must be given both or neither, got one None"):
        F.batch_norm(x, c, None, training=True)
    with pytest.raises(RuntimeError, match="batch_norm: running_mean and running_var must have the batch dimension of vmap"):
        torch.vmap(lambda x: F.batch_norm(x, c, c + 1, training=True))(x[None])
    with pytest.raises(RuntimeError, match=r"batch_norm: weight must have shape \[6\] \(input is \[2, 6, 4, 4\]\), got \[5\]"):
        F.batch_norm(x, c, c, torch.ones(5))
    with pytest.raises(RuntimeError, match="group_norm: num_groups must divide the channels of input"):
        F.group_norm(x, 4)
    with pytest.raises(ValueError, match="group_norm: activation must be one of identity, relu"):
        F.group_norm(x, 2, activation="swish")
    with pytest.raises(TypeError, match="batch_norm: residual must have the dtype and shape of input"):
        F.batch_norm(x, c, c, residual=x.double())
    with pytest.raises(ValueError, match="expected 4D input"):
        fusegrad.nn.BatchNorm2d(6)(torch.randn(3, 6))


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("options", ({}, {"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}, {"affine": False}), ids=str)
@each_format
def test_running_statistics_are_torchs(options, dtype, fmt):
    ours, native = fusegrad.nn.BatchNorm2d(5, **options), torch.nn.BatchNorm2d(5, **options)
    for step in range(4):
        x = images(6, 5, 4, 7, fmt=fmt, dtype=dtype, seed=step) * 2 + 1
        torch.testing.assert_close(ours(x), native(x))
        for (name, a), b in zip(ours.state_dict().items(), native.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    ours.eval(), native.eval()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    torch.testing.assert_close(ours(x), native(x))
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_running_statistics_in_the_functional():
    x = images(3, 4, 5)
    for momentum in (0.1, 0.0, 1.0):
        ours, native = ((torch.ones(4), torch.full((4,), 2.0)) for _ in range(2))
        F.batch_norm(x, *ours, training=True, momentum=momentum)
        torch.nn.functional.batch_norm(x, *native, training=True, momentum=momentum)
        torch.testing.assert_close(ours, native, rtol=1e-6, atol=1e-6)
    F.batch_norm(x[:0], *ours, training=True)  # of no item there is nothing to learn
    torch.testing.assert_close(ours, native, rtol=1e-6, atol=1e-6)


def test_running_statistics_of_16_bits_are_rounded_once():
    x = images(6, 300, 4, 7, dtype=BF16)
    mean, var = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)).to(BF16)
    exact = zip((mean, var), (x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))))
    expected = [(0.7 * running.double() + 0.3 * batch).to(BF16) for running, batch in exact]
    F.batch_norm(x, mean, var, training=True, momentum=0.3)
    assert torch.equal(mean, expected[0]) and torch.equal(var, expected[1])


@pytest.mark.parametrize("shape, groups", (((4, 64, 9, 11), 8), ((3, 6, 70, 40), 3), ((2, 8, 2), 4), ((40, 6, 3, 3), 1)), ids=str)
@pytest.mark.parametrize("mean", (1e4, -1e6))
@each_format
def test_far_from_zero(mean, fmt, shape, groups):
    """A mean that is up to a million spreads away: values and gradients to float32's last digits, from the same float32 input."""
    make = Make(F64, seed=4)
    x = make(*shape).mul(1e-6 * abs(mean)).add(mean).float()
    x = x.to(memory_format=fmt) if x.dim() == 4 else x
    w, b, dy = make.param(shape[1]).float(), make.param(shape[1]).float(), make(*shape).float()
    for f in (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True, eps=1e-20),
        lambda x, w, b: F.group_norm(x, groups, w, b, eps=1e-20),
        lambda x, w, b: F.layer_norm_2d(x, w, b, eps=1e-20),
    ):
        narrow, wide = ([t.to(dtype).requires_grad_() for t in (x, w, b)] for dtype in (F32, F64))
        found = f(*narrow)
        with fusegrad.use_reference():
            exact = f(*wide)
        pairs = zip((found, *torch.autograd.grad(found, narrow, dy)), (exact, *torch.autograd.grad(exact, wide, dy.double())))
        for ours, expected in pairs:
            assert (ours - expected).abs().max() <= 4e-6 * expected.abs().max()


SHAPES = ((2, 3, 1, 1), (3, 5, 2, 2), (70, 6, 3, 3), (2, 64, 17, 19), (1, 130, 33, 9), (5, 257, 4, 4), (1, 4, 150, 130), (40, 32, 1, 1))


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_format
def test_shapes_and_formats(shape, fmt, dtype):
    """Every way to walk an image, and incoming gradients in the other format."""
    make, c = Make(dtype), shape[1]
    x, r = make(*shape).to(memory_format=fmt), make(*shape)
    w, b = make.param(c), make.param(c)
    groups = next(g for g in (8, 5, 3, 2, 1) if c % g == 0)
    for name, kwargs in (
        ("batch_norm", dict(input=x, running_mean=None, running_var=None, weight=w, bias=b, training=True, activation="silu", residual=r)),
        ("group_norm", dict(input=x, num_groups=groups, weight=w, bias=b, activation="gelu")),
        ("layer_norm_2d", dict(input=x, weight=w, bias=b)),
    ):
        sample = Sample(name, kwargs)
        y = call(OPS[name], sample)
        assert y[0].stride() == torch.empty_like(x).stride()
        for g in FORMATS:
            cotangent = tuple(t.to(memory_format=g) for t in cotangents(y))
            check(OPS[name], sample, run(OPS[name], sample, cotangent), cotangent)


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("shape", ((11, 4, 250, 320), (131, 16, 30, 40)), ids=str)
@each_format
def test_images_that_are_done_a_few_at_a_time(shape, fmt, dtype):
    """All of them are more than are done at once, and the last ones are fewer; with groups that are cut into cells, and small ones."""
    make, op = Make(dtype), OPS["group_norm"]
    x, c = make(*shape).to(memory_format=fmt), shape[1]
    for groups in (1, 4):
        sample = Sample(str(groups), dict(input=x, num_groups=groups, weight=make.param(c), bias=make.param(c), activation="silu"))
        cotangent = cotangents(call(op, sample))
        check(op, sample, run(op, sample, cotangent), cotangent)


@pytest.mark.parametrize("given", (("weight", "bias"), ("weight",), ("bias",), ()), ids="-".join)
@pytest.mark.parametrize("dtype, param", PAIRS, ids=name_of)
def test_groups_that_are_short_rows(given, dtype, param):
    """Done in one walk: alone, and where samples or channels are left out in between."""
    make = Make(dtype, param)
    options = dict(num_groups=3, activation="silu") | {name: make.param(12) for name in given}
    for x in (make(40, 12, 7, 9), make(80, 12, 7, 9)[::2], make(40, 16, 7, 9)[:, 3:15], make(1, 12, 7, 9).expand(40, 12, 7, 9)):
        sample = Sample(str(x.stride()), dict(input=x) | options)
        cotangent = cotangents(call(OPS["group_norm"], sample))
        check(OPS["group_norm"], sample, run(OPS["group_norm"], sample, cotangent), cotangent)


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("shape, groups", (((1, 8, 3), 8), ((2, 64, 1), 32), ((3, 96, 5), 96), ((70, 6, 65), 2), ((300, 12, 2), 4)))
def test_groups_that_are_rows_of_many_sets(shape, groups, dtype):
    """Each group's rows have parameters of their own, and its sums over few samples and many."""
    make = Make(dtype, F32)
    x = make(*shape)
    for extra in (dict(weight=make.param(shape[1]), bias=make.param(shape[1])), dict(weight=make.param(shape[1])), {}):
        sample = Sample(str(shape), dict(input=x, num_groups=groups, activation="silu") | extra)
        cotangent = cotangents(call(OPS["group_norm"], sample))
        check(OPS["group_norm"], sample, run(OPS["group_norm"], sample, cotangent), cotangent)


@pytest.mark.parametrize("samples", (1, 8, 70))
def test_memory_of_groups_that_are_rows(samples):
    """What is documented is enough where planes are large beside the samples, too."""
    x, w, b = torch.randn(samples, 64, 32, 32), torch.randn(64), torch.randn(64)
    sample = dict(input=x, num_groups=8, weight=w, bias=b)
    assert allocated(lambda: F.group_norm(**sample)) <= x.nbytes + OPS["group_norm"].workspace(sample)
    for t in (x, w, b):
        t.requires_grad_()
    y, dy = F.group_norm(**sample), torch.randn_like(x)
    asked = allocated(lambda: torch.autograd.grad(y, (x, w, b), dy, retain_graph=True))
    assert asked <= x.nbytes + w.nbytes + b.nbytes + OPS["group_norm"].workspace(sample)


@pytest.mark.parametrize("name", ("batch_norm", "group_norm", "layer_norm_2d"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_format
def test_the_format_is_kept_and_nothing_is_copied(name, fmt, dtype):
    x = images(4, 64, 40, 40, fmt=fmt, dtype=dtype).requires_grad_()
    options = dict(weight=torch.ones(64, dtype=dtype), bias=torch.zeros(64, dtype=dtype))
    options |= dict(
        batch_norm=dict(running_mean=None, running_var=None, training=True, activation="relu"), group_norm=dict(num_groups=8)
    ).get(name, {})
    y = getattr(F, name)(x, **options)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
    assert y.is_contiguous(memory_format=fmt) and dx.is_contiguous(memory_format=fmt)
    slack = 256 * 1024  # statistics; a copy would take 0.8 or 1.6 MB
    with torch.no_grad():
        assert allocated(lambda: getattr(F, name)(x, **options)) <= y.nbytes + slack
    assert allocated(lambda: torch.autograd.grad(y, x, g, retain_graph=True)) <= x.nbytes + slack


@each_format
def test_gradient_penalty_is_torchs(fmt):
    """The norm of a gradient through the statistics of the batch, differentiated again; and with constant statistics."""
    x, r = images(4, 3, 5, 5, fmt=fmt, dtype=F64), images(4, 3, 5, 5, dtype=F64, seed=1)
    w, b, running = Make(F64).param(3), Make(F64).param(3), (torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64))
    for training in (True, False):
        found = []
        for ours in (True, False):
            leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b, r)]
            stats = tuple(t.clone() for t in running)
            if ours:
                y = F.batch_norm(leaves[0], *stats, leaves[1], leaves[2], training, residual=leaves[3])
            else:
                y = torch.nn.functional.batch_norm(leaves[0], *stats, leaves[1], leaves[2], training) + leaves[3]
            grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            loss = sum(g.square().sum() for g in grads) + y.square().sum()
            found.append(torch.autograd.grad(loss, leaves))
        for a, b_ in zip(*found):
            torch.testing.assert_close(a, b_, rtol=1e-9, atol=1e-9)


def test_eval_gradients():
    x, make = images(3, 4, 5, 5, dtype=F64), Make(F64)
    mean, var, w, b = make(4), make.param(4, positive=True), make.param(4), make.param(4)
    ours, native = ([t.clone().requires_grad_() for t in (x, w, b)] for _ in range(2))
    g = make(3, 4, 5, 5)
    got = torch.autograd.grad(F.batch_norm(ours[0], mean, var, *ours[1:]), ours, g)
    expected = torch.autograd.grad(torch.nn.functional.batch_norm(native[0], mean, var, *native[1:]), native, g)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_vmap():
    x = images(3, 4, 5, 6)
    got = torch.func.vmap(lambda x: F.batch_norm(x, None, None, training=True))(x[:, :, None])
    for a, part in zip(got, x[:, :, None]):
        torch.testing.assert_close(a, F.batch_norm(part, None, None, training=True))
    running = torch.zeros(3, 5), torch.ones(3, 5)
    batch = images(3, 4, 5, 6)
    torch.func.vmap(lambda x, m, v: F.batch_norm(x, m, v, training=True))(batch, *running)
    for x, m, v in zip(batch, *running):
        one = torch.zeros(5), torch.ones(5)
        torch.nn.functional.batch_norm(x, *one, training=True)
        torch.testing.assert_close((m, v), one)


def test_training_compiles():
    """One graph, and the running statistics of eager."""
    ours, twin = (fusegrad.nn.BatchNorm2d(4, activation="relu") for _ in range(2))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for step in range(2):
        x, r = images(3, 4, 5, 5, seed=step), images(3, 4, 5, 5, seed=9)
        torch.testing.assert_close(compiled(x, r), twin(x, r))
    for a, b in zip(ours.state_dict().values(), twin.state_dict().values()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ("batch_norm", "group_norm"))
def test_more_dimensions_than_a_view_walks(name):
    """That lie in memory in no order that could be joined."""
    x = Make()(*[2] * 10).permute(*reversed(range(10))).requires_grad_()
    options = dict(batch_norm=dict(running_mean=None, running_var=None, training=True), group_norm=dict(num_groups=1))[name]
    y = getattr(F, name)(x, **options)
    flat = x.reshape(2, 2, -1)
    expected = getattr(F, name)(flat, **options)
    torch.testing.assert_close(y, expected.view(x.shape))
    g = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, g.reshape(out.shape)) for out in (y, expected)))
