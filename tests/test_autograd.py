"""The shared autograd machinery, on a toy op and on the cases that no table lists."""

import pytest
import torch
import torch.nn.functional as F

import fusegrad
import fusegrad.functional as fused
from fusegrad import _transforms
from fusegrad._autograd import Function, differentiable, first_order_only


class CubeFn(Function):
    """x^3 with a backward that torch cannot see through."""

    op = "toy_cube"
    reference = staticmethod(lambda x: x * x * x)

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        (x,) = inputs
        ctx.options = ()
        ctx.save_for_backward(x)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dy):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * dy


class OnceFn(CubeFn):
    @first_order_only
    def backward(ctx, dy):
        return 3 * ctx.saved_tensors[0] ** 2 * dy


class SilentFn(CubeFn):
    """What other libraries do: the kernel, whoever asks."""

    @staticmethod
    def backward(ctx, dy):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * dy


def loss_and_penalty(f, x):
    """The gradient of sum(y) + sum((dy/dx)^2): the penalty's part is what gets lost."""
    y = f(x).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    return torch.autograd.grad(y + g.square().sum(), x)[0]


def test_the_trap_is_real_and_the_machinery_avoids_it():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    expected = 3 * x**2 + 36 * x**3
    assert torch.equal(loss_and_penalty(lambda x: x**3, x), expected)
    assert torch.equal(loss_and_penalty(lambda x: CubeFn.call((x,)), x), expected)
    assert torch.equal(loss_and_penalty(SilentFn.apply, x), 3 * x**2)  # wrong, and nobody said so


@pytest.mark.parametrize("how", ("grad", "backward"))
def test_an_op_without_second_order_raises(how):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(torch.autograd.grad(OnceFn.apply(x).sum(), x)[0], 3 * x.detach() ** 2)
    y = OnceFn.apply(x).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(g.detach(), 3 * x.detach() ** 2)
    with pytest.raises(RuntimeError, match="toy_cube: the backward of this op cannot be differentiated"):
        loss = y + g.square().sum()
        torch.autograd.grad(loss, x) if how == "grad" else loss.backward()


def test_the_first_derivative_alone_still_works_with_create_graph():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    OnceFn.apply(x).sum().backward(create_graph=True)
    assert torch.equal(x.grad.detach(), 3 * x.detach() ** 2)


def test_the_same_tensor_in_two_places():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fused.swiglu(x, x), x)
    torch.testing.assert_close(torch.autograd.grad(fused.swiglu(x, x).sum(), x), torch.autograd.grad((F.silu(x) * x).sum(), x))


def test_third_order():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def third(f):
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(h.square().sum(), x)[0]

    torch.testing.assert_close(third(lambda x: fused.rms_norm(x, (5,), eps=1e-3)), third(lambda x: F.rms_norm(x, (5,), eps=1e-3)))


def test_undefined_gradients():
    """An output nobody uses costs nothing and breaks nothing."""
    x = torch.randn(4, 6, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    loss, lse = fused.cross_entropy(x, target, return_lse=True, reduction="none")
    (only_lse,) = torch.autograd.grad(lse.sum(), x, retain_graph=True)
    torch.testing.assert_close(only_lse, x.detach().softmax(1))
    (only_loss,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(only_loss, x.detach().softmax(1) - F.one_hot(target, 6))


def test_expanded_cotangent():
    x = torch.randn(4, 6, requires_grad=True)
    y = fused.rms_norm(x, (6,), eps=1e-3)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(F.rms_norm(x, (6,), eps=1e-3).sum(), x))


def test_strict_stats_and_why_not():
    z = torch.randn(3, 8, dtype=torch.complex64)
    assert fusegrad.why_not(torch.ones(2)) is None
    assert fusegrad.why_not(z) == "there is no kernel for torch.complex64"
    with fusegrad.strict(), pytest.raises(RuntimeError, match="rms_norm: there is no kernel for torch.complex64"):
        fused.rms_norm(z, (8,), eps=1e-5)
    with fusegrad.strict(False), pytest.warns(UserWarning, match="rms_norm: there is no kernel for torch.complex64; using the reference"):
        y = fused.rms_norm(z, (8,), eps=1e-5)
    torch.testing.assert_close(y, F.rms_norm(z, (8,), eps=1e-5))
    assert fusegrad.stats() == {("rms_norm", "there is no kernel for torch.complex64"): 1}
    fusegrad.reset_stats()
    assert fusegrad.stats() == {}


def test_kernels_are_taken_in_plain_training():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    fused.rms_norm(x, (8,), w).square().sum().backward()
    assert fusegrad.stats() == {}
    with fusegrad.use_reference():
        assert fused.rms_norm(x, (8,), w).grad_fn.name() != "RMSNormFnBackward"
    assert fused.rms_norm(x, (8,), w).grad_fn.name() == "RMSNormFnBackward"


def test_without_private_names(monkeypatch):
    """The names of torch that are not public are used where they exist; without them only the host cost changes."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = fused.rms_norm(x, (8,), w)
    expected = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    monkeypatch.setattr(_transforms, "_BASE", None)
    y = fused.rms_norm(x, (8,), w)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, (x, w), torch.ones_like(y)), expected))


def test_torch_function_subclasses_and_modes():
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(3, 8).as_subclass(Logged)
    y = fused.rms_norm(x, (8,), eps=1e-5)
    assert fused.rms_norm in seen and type(y) is Logged
    torch.testing.assert_close(y.as_subclass(torch.Tensor), F.rms_norm(x.as_subclass(torch.Tensor), (8,), eps=1e-5))
    with torch.device("cpu"):
        fused.swiglu(torch.randn(2, 4))


def test_inference_mode():
    with torch.inference_mode():
        x = torch.randn(3, 8)
        torch.testing.assert_close(fused.rms_norm(x, (8,)), F.rms_norm(x, (8,)))


def test_profiler_names_the_ops():
    x = torch.randn(3, 8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused.rms_norm(x, (8,)).backward(torch.ones(3, 8))
    assert {"fusegrad::rms_norm_fwd", "fusegrad::rms_norm_bwd"} <= {e.key for e in profile.key_averages()}


def test_fake_tensors_and_make_fx_go_through_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        assert fused.rms_norm(torch.empty(5, 8), (8,)).shape == (5, 8)
    graph = make_fx(lambda x: fused.rms_norm(x, (8,)))(torch.randn(3, 8))
    assert "fusegrad.rms_norm_fwd" in graph.code


def test_flops_are_counted_as_torchs():
    from torch.utils.flop_counter import FlopCounterMode

    labels, x = torch.tensor([0, 3, 4]), torch.randn(3, 8, requires_grad=True)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 5))
    for pair in (torch.nn.Linear(8, 6), fusegrad.nn.Linear(8, 6)), (mlp, fusegrad.nn.MLP((8, 16, 5), "gelu")):
        for of_x in (x, x.detach()):
            found = []
            for model in pair:
                with FlopCounterMode(display=False) as counter:
                    y = model(of_x)
                    y.backward(torch.ones_like(y))
                found.append(counter.get_total_flops())
            assert found[0] == found[1] > 0

    w, logits = torch.randn(5, 8, requires_grad=True), 2 * 3 * 5 * 8
    for options, products in ({}, 3), (dict(return_lse=True), 4), (dict(reduction="none"), 4):
        with FlopCounterMode(display=False) as counter:
            y = fused.linear_cross_entropy(x, w, labels, **options)
            y = (y[0] if options.get("return_lse") else y).sum()
            y.backward()
        assert counter.get_total_flops() == products * logits
    with FlopCounterMode(display=False) as counter:
        fused.linear_cross_entropy(x, w.detach(), labels).backward()
    assert counter.get_total_flops() == 2 * logits


def test_hooks():
    """Tensor, module and post-accumulate hooks see what they see of torch.nn."""
    layer, seen = fusegrad.nn.RMSNorm(8), []
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_hook(lambda m, args, y: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda m, g: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x = torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    y.register_hook(lambda g: seen.append("tensor"))
    y.retain_grad()
    y.backward(torch.ones_like(y))
    assert y.grad is not None and sorted(seen) == sorted(["pre", "forward", "tensor", "backward pre", "accumulated", "backward"])


def test_training_steps_equal_torch():
    """Twenty steps of a small network: the same loss curve as torch.nn, step by step."""

    def train(nn):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 32), nn.RMSNorm(32), torch.nn.Linear(32, 5)).double()
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x, t = torch.randn(64, 12).double(), torch.randint(5, (64,))
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_fn(model(x), t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=torch.float64)

    torch.testing.assert_close(train(fusegrad.nn), train(torch.nn), rtol=1e-9, atol=1e-9)


def test_a_kernel_by_itself_has_no_derivative():
    """Whoever calls torch.ops gets an error, and not no gradient and a warning."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    kernels = torch.ops.fusegrad
    y, rstd = kernels.rms_norm_fwd(x, w, 1, 1e-5, 0.0, False)
    dx, _ = kernels.rms_norm_bwd(torch.ones(4, 8), x, w, rstd.detach(), 1, 0.0, [True, True])
    for result, name in ((y, "rms_norm_fwd"), (dx, "rms_norm_bwd")):
        with pytest.raises(RuntimeError, match=f"derivative for fusegrad::{name} is not implemented"):
            torch.autograd.grad(result.sum(), x)
