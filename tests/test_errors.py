# ruff: noqa: E501  (a case a line)
"""Bad input: an error of torch's type that names op, argument, expectation and fact; and what torch accepts is accepted."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import fusegrad
import fusegrad.functional as fused
from fusegrad import nn

x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
labels = torch.tensor([0, 1, 2, 3])
ones, learned = torch.ones(8), torch.ones(8, requires_grad=True)
sparse, nested = x.to_sparse(), torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])

BAD = [
    (lambda: fused.rms_norm(x, ()), RuntimeError, "rms_norm: normalized_shape must be the last dimensions of input ([4, 8]) and at least one, got []"),
    (lambda: fused.rms_norm(x, (7,)), RuntimeError, "rms_norm: normalized_shape must be the last dimensions of input ([4, 8]) and at least one, got [7]"),
    (lambda: fused.rms_norm(x, (1, 4, 8)), RuntimeError, "rms_norm: normalized_shape must be the last dimensions of input ([4, 8]) and at least one, got [1, 4, 8]"),
    (lambda: fused.rms_norm(x, 8), TypeError, "rms_norm: normalized_shape must be a sequence of sizes, got int"),
    (lambda: fused.rms_norm([1.0], (1,)), TypeError, "rms_norm: input must be a Tensor, got list"),
    (lambda: fused.rms_norm(x, (8,), torch.ones(7)), RuntimeError, "rms_norm: weight must have shape [8], got [7]"),
    (lambda: fused.layer_norm(x, (8,), torch.ones(8).double()), TypeError, "layer_norm: weight must be Float, got Double"),
    (lambda: fused.layer_norm(x.half(), (8,), torch.ones(8).bfloat16()), TypeError, "layer_norm: weight must be Half or Float, got BFloat16"),
    (lambda: fused.rms_norm(x, (8,), torch.ones(8, device="meta")), RuntimeError, "rms_norm: weight must be on cpu, where the first argument is, got a tensor on meta"),
    (lambda: fused.rms_norm(sparse, (8,)), RuntimeError, "rms_norm: input must be a dense tensor, got a tensor of layout Sparse"),
    (lambda: fused.rms_norm(x, (8,), cast_order="gemma"), ValueError, "rms_norm: cast_order must be 'torch' or 'llama', got 'gemma'"),
    (lambda: fused.swiglu(x, x[:, :4]), RuntimeError, "swiglu: up must have the dtype and shape of gate (torch.float32 [4, 8]), got torch.float32 [4, 4]"),
    (lambda: fused.swiglu(x, x.double()), TypeError, "swiglu: up must have the dtype and shape of gate (torch.float32 [4, 8]), got torch.float64 [4, 8]"),
    (lambda: fused.swiglu(x[:, :7]), RuntimeError, "swiglu: input must have an even size in dimension 1, got [4, 7]"),
    (lambda: fused.swiglu(x, dim=2), IndexError, "swiglu: dim must be in [-2, 1] for input [4, 8], got 2"),
    (lambda: fused.swiglu(torch.tensor(1.0)), RuntimeError, "swiglu: input must have at least one dimension, got a scalar"),
    (lambda: fused.swiglu(sparse), RuntimeError, "swiglu: input must be a dense tensor, got a tensor of layout Sparse"),
    (lambda: fused.swiglu(None), TypeError, "swiglu: gate must be a Tensor, got NoneType"),
    (lambda: fused.cross_entropy(x, torch.tensor([0, 1, 2, 8])), IndexError, "cross_entropy: target must be in [0, 8) or ignore_index (-100), got 8"),
    (lambda: fused.cross_entropy(x, torch.tensor([0, 1, 2, -1])), IndexError, "cross_entropy: target must be in [0, 8) or ignore_index (-100), got -1"),
    (lambda: fused.cross_entropy(x, labels[:3]), ValueError, "cross_entropy: target must have one class per item, shape [4] for input [4, 8], got [3]"),
    (lambda: fused.cross_entropy(x, labels.int()), RuntimeError, "cross_entropy: target must be int64 (class indices), got torch.int32"),
    (lambda: fused.cross_entropy(x, labels, torch.ones(7)), RuntimeError, "cross_entropy: weight must have one element per class ([8]), got [7]"),
    (lambda: fused.cross_entropy(x, labels, torch.ones(8).double()), TypeError, "cross_entropy: weight must be Float, got Double"),
    (lambda: fused.cross_entropy(x, labels, torch.ones(8, requires_grad=True)), RuntimeError, "cross_entropy: weight must not require grad, it is a constant"),
    (lambda: fused.linear_cross_entropy(x, x, labels, weight=torch.ones(4, requires_grad=True)), RuntimeError, "linear_cross_entropy: weight must not require grad, it is a constant"),
    (lambda: fused.cross_entropy(x, labels, reduction="average"), ValueError, "cross_entropy: reduction must be 'mean', 'sum' or 'none', got 'average'"),
    (lambda: fused.cross_entropy(x, labels, label_smoothing=1.5), RuntimeError, "cross_entropy: label_smoothing must be in [0, 1], got 1.5"),
    (lambda: fused.cross_entropy(x, labels, empty="one"), ValueError, "cross_entropy: empty must be 'nan' or 'zero', got 'one'"),
    (lambda: fused.cross_entropy(x, labels, logit_softcap=0.0), ValueError, "cross_entropy: logit_softcap must be positive or None, got 0.0"),
    (lambda: fused.cross_entropy(x, labels, num_items=0), ValueError, "cross_entropy: num_items must be positive, got 0.0"),
    (lambda: fused.cross_entropy(x, labels, num_items=3, reduction="sum"), ValueError, "cross_entropy: num_items is the divisor of reduction='mean', got reduction='sum'"),
    (lambda: fused.cross_entropy(torch.tensor(1.0), torch.tensor(0)), RuntimeError, "cross_entropy: input must have at least one dimension, got a scalar"),
    (lambda: fused.cross_entropy(x[0], labels[:1]), ValueError, "cross_entropy: target must have one class per item, shape [] for input [8], got [1]"),
    (lambda: fused.cross_entropy(x, [0]), TypeError, "cross_entropy: target must be a Tensor, got list"),
    (lambda: fused.cross_entropy(x, labels.to("meta")), RuntimeError, "cross_entropy: target must be on cpu, where the first argument is, got a tensor on meta"),
    (lambda: fused.cross_entropy(x, labels, logit_scale=torch.tensor(2.0)), TypeError, "cross_entropy: logit_scale must be a number (no gradient flows to it), got Tensor"),
    (lambda: fused.cross_entropy(x, labels, num_items=torch.ones(3)), RuntimeError, "cross_entropy: num_items must be a number or have no dimension, got [3]"),
    (lambda: fused.exp(labels), TypeError, "exp: input must be a floating-point tensor, got torch.int64"),
    (lambda: fused.mse_loss(x.cfloat(), x), TypeError, "mse_loss: input and target must be real, got torch.complex64 and torch.float32"),
    (lambda: fused.cross_entropy(sparse, labels), RuntimeError, "cross_entropy: input must be a dense tensor, got a tensor of layout Sparse"),
    (lambda: fused.batch_norm(x, learned, ones), RuntimeError, "batch_norm: running_mean must not require grad, it is a constant"),
    (lambda: fused.batch_norm(x, ones, learned, training=True), RuntimeError, "batch_norm: running_var must not require grad, it is a constant"),
    (lambda: fused.cross_entropy(x, labels, num_items=learned[0]), RuntimeError, "cross_entropy: num_items must not require grad, it is a constant"),
    (lambda: fused.linear_cross_entropy(x, x, labels[:4] % 4, num_items=learned[0]), RuntimeError, "linear_cross_entropy: num_items must not require grad, it is a constant"),
    (lambda: fused.cross_entropy(x, labels, ignore_index=1.9), TypeError, "cross_entropy: ignore_index must be an int, got float"),
    (lambda: fused.cross_entropy(x, labels, ignore_index=True), TypeError, "cross_entropy: ignore_index must be an int, got bool"),
    (lambda: fused.linear_cross_entropy(x, x, labels, ignore_index="2"), TypeError, "linear_cross_entropy: ignore_index must be an int, got str"),
    (lambda: fused.linear_token_log_probs(x, x, labels, ignore_index=1.0), TypeError, "linear_token_log_probs: ignore_index must be an int, got float"),
    (lambda: fused.vocab_parallel_cross_entropy(x, labels, ignore_index=1.0), TypeError, "vocab_parallel_cross_entropy: ignore_index must be an int, got float"),
    (lambda: fused.batch_norm(x, None, None, training=True, momentum="x"), TypeError, "batch_norm: momentum must be a number (no gradient flows to it), got str"),
    (lambda: fused.batch_norm(x, ones, ones, eps="x"), TypeError, "batch_norm: eps must be a number (no gradient flows to it), got str"),
    (lambda: fused.huber_loss(x, x, delta="1"), TypeError, "huber_loss: delta must be a number (no gradient flows to it), got str"),
    (lambda: fused.smooth_l1_loss(x, x, beta="1"), TypeError, "smooth_l1_loss: beta must be a number (no gradient flows to it), got str"),
    (lambda: fused.js_div(x, x, beta="1"), TypeError, "js_div: beta must be a number (no gradient flows to it), got str"),
    (lambda: fused.cross_entropy(x, labels, label_smoothing="1"), TypeError, "cross_entropy: label_smoothing must be a number (no gradient flows to it), got str"),
    (lambda: fused.group_norm(x, 2.0), TypeError, "group_norm: num_groups must be an int, got float"),
    (lambda: fused.group_norm(x, None), TypeError, "group_norm: num_groups must be an int, got NoneType"),
    (lambda: fused.softmax(x, 1.0), TypeError, "softmax: dim must be an int, got float"),
    (lambda: fused.glu(x, 1.0), TypeError, "glu: dim must be an int, got float"),
    (lambda: fused.swiglu(x, dim=0.5), TypeError, "swiglu: dim must be an int, got float"),
    (lambda: fused.bias_act(x, ones, dim=0.5), TypeError, "bias_act: dim must be an int, got float"),
    (lambda: fused.bias_act(torch.tensor(1.0), ones), RuntimeError, "bias_act: input must have at least one dimension for a bias, got a scalar"),
    (lambda: fused.glu(torch.tensor(1.0)), RuntimeError, "glu: input must have at least one dimension, got a scalar"),
    (lambda: fused.cross_entropy(x, labels, [1.0] * 8), TypeError, "cross_entropy: weight must be a Tensor, got list"),
    (lambda: fused.linear_cross_entropy(x, x, labels, weight=[1.0] * 4), TypeError, "linear_cross_entropy: weight must be a Tensor, got list"),
    (lambda: fused.linear_cross_entropy(x, x, labels, linear_bias=[1.0] * 4), TypeError, "linear_cross_entropy: linear_bias must be a Tensor, got list"),
    (lambda: fused.layer_norm(x, (8,), [1.0] * 8), TypeError, "layer_norm: weight must be a Tensor, got list"),
    (lambda: fused.layer_norm_2d(x, [1.0] * 8), TypeError, "layer_norm_2d: weight must be a Tensor, got list"),
    (lambda: fused.dyt(x, ones[:1], [1.0] * 8, None), TypeError, "dyt: weight must be a Tensor, got list"),
    (lambda: fused.batch_norm(x, None, None, [1.0] * 8, training=True), TypeError, "batch_norm: weight must be a Tensor, got list"),
    (lambda: fused.batch_norm(x, None, None, training=True, residual=3), TypeError, "batch_norm: residual must be a Tensor, got int"),
    (lambda: fused.bias_dropout_add(x, [1.0] * 8, x), TypeError, "bias_dropout_add: bias must be a Tensor, got list"),
    (lambda: fused.linear(x, x, [1.0] * 4), TypeError, "linear: bias must be a Tensor, got list"),
    (lambda: fused.linear(x, x, torch.ones(3)), RuntimeError, "linear: bias must have shape [4], got [3]"),
    (lambda: fused.linear(x, ones[:7]), RuntimeError, "linear: weight must have shape [out, in] or [in] for input [*, in] ([4, 8]), got [7]"),
    (lambda: fused.rotary_embedding(x, x, x, x, position_ids=labels + 2), IndexError, "rotary_embedding: position_ids must be in [0, 4), the rows of cos, got 2 to 5"),
    (lambda: nn.SigmoidFocalLoss(reduction="x"), ValueError, "SigmoidFocalLoss: reduction must be 'mean', 'sum' or 'none', got 'x'"),
    (lambda: nn.SigmoidFocalLoss(alpha="x"), TypeError, "SigmoidFocalLoss: alpha must be a number (no gradient flows to it), got str"),
    (lambda: nn.JSDivLoss(beta=2), ValueError, "JSDivLoss: beta must be between 0 and 1 (at the ends the divergence is 0: see kl_div), got 2.0"),
    (lambda: nn.RMSNorm(4, cast_order="x"), ValueError, "RMSNorm: cast_order must be 'torch' or 'llama', got 'x'"),
    (lambda: nn.AddRMSNorm(4, cast_order="x"), ValueError, "AddRMSNorm: cast_order must be 'torch' or 'llama', got 'x'"),
    (lambda: nn.CrossEntropyLoss(empty="x"), ValueError, "CrossEntropyLoss: empty must be 'nan' or 'zero', got 'x'"),
    (lambda: nn.CrossEntropyLoss(logit_softcap=-1), ValueError, "CrossEntropyLoss: logit_softcap must be positive or None, got -1"),
    (lambda: nn.CrossEntropyLoss(ignore_index=1.9), TypeError, "CrossEntropyLoss: ignore_index must be an int, got float"),
    (lambda: nn.LinearCrossEntropyLoss(4, 8, empty="x"), ValueError, "LinearCrossEntropyLoss: empty must be 'nan' or 'zero', got 'x'"),
    (lambda: nn.LinearCrossEntropyLoss(4, 8, options=3), TypeError, "LinearCrossEntropyLoss: options must be a torch.nn.LinearCrossEntropyOptions or None, got int"),
    (lambda: nn.BiasAct(4, scale="x"), TypeError, "BiasAct: scale must be a number (no gradient flows to it), got str"),
    (lambda: nn.BiasAct(4, dim=0.5), TypeError, "BiasAct: dim must be an int, got float"),
    (lambda: nn.ScaledMaskedSoftmax(scale="x"), TypeError, "ScaledMaskedSoftmax: scale must be a number (no gradient flows to it), got str"),
    (lambda: nn.Scale("a"), TypeError, "Scale: factor must be a number (no gradient flows to it), got str"),
    (lambda: nn.GradientReversal("a"), TypeError, "GradientReversal: alpha must be a number (no gradient flows to it), got str"),
    (lambda: nn.SwiGLU("x"), TypeError, "SwiGLU: dim must be an int, got str"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:60] for _, _, text in BAD])
def test_error_texts(call, error, text):
    with pytest.raises(error, match=re.escape(text) + "$") as info:
        call()
    assert type(info.value) is error
    # The next call works: nothing is left behind.
    torch.testing.assert_close(fused.rms_norm(x, (8,)), F.rms_norm(x, (8,)))


@pytest.mark.parametrize("call", (
    lambda t: fused.rms_norm(t, (8,)), lambda t: fused.swiglu(t), lambda t: fused.cross_entropy(t, torch.zeros(4, dtype=torch.long)),
))  # fmt: skip
@pytest.mark.parametrize("kind", ("nested", "quantized", "csr", "mkldnn"))
def test_layouts_that_no_kernel_takes(call, kind):
    make = dict(
        nested=lambda: nested,
        quantized=lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        csr=lambda: x.to_sparse_csr(),
        mkldnn=lambda: x.to_mkldnn(),
    )
    with pytest.raises((RuntimeError, TypeError), match="dense tensor|no kernel|a floating-point tensor"):
        call(make[kind]())


def test_cuda_tensor_and_a_build_for_the_cpu(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(fusegrad._op, "_C", type("CPUOnly", (), {"with_cuda": False}))
    monkeypatch.setattr(fusegrad._op, "KERNEL_DEVICES", ("cpu",))
    with FakeTensorMode(), fusegrad.strict(False):
        z, t = torch.empty(4, 8, device="cuda"), torch.empty(4, dtype=torch.long, device="cuda")
        for name, call in (
            ("rms_norm", lambda: fused.rms_norm(z, (8,))),
            ("swiglu", lambda: fused.swiglu(z)),
            ("cross_entropy", lambda: fused.cross_entropy(z, t)),
        ):
            with pytest.raises(
                RuntimeError, match=rf"^{name}: input is on cuda:0, but this build of fusegrad has kernels for the CPU only; reinstall"
            ):
                call()
    assert not fusegrad.stats()


def test_what_torch_accepts():
    ours = [fused.rms_norm(x, (8,), eps=e) for e in (0.0, -0.5, float("nan"))]
    for a, e in zip(ours, (0.0, -0.5, float("nan"))):
        torch.testing.assert_close(a, F.rms_norm(x, (8,), eps=e), equal_nan=True)
    with fusegrad.strict(False), pytest.warns(UserWarning, match="there is no kernel for torch.complex128"):
        z = torch.randn(4, 8, dtype=torch.complex128)
        torch.testing.assert_close(fused.rms_norm(z, (8,)), F.rms_norm(z, (8,)))
    torch.testing.assert_close(fused.cross_entropy(x, labels.to(torch.uint8)), F.cross_entropy(x, labels.to(torch.uint8)))
    soft = torch.rand(4, 8).softmax(1)
    with fusegrad.strict(False), pytest.warns(UserWarning, match="targets are probabilities"):
        torch.testing.assert_close(fused.cross_entropy(x, soft, label_smoothing=0.1), F.cross_entropy(x, soft, label_smoothing=0.1))
    for args in (dict(size_average=False), dict(reduce=False), dict(size_average=True, reduce=True)):
        with pytest.warns(UserWarning):
            torch.testing.assert_close(fused.cross_entropy(x, labels, **args), F.cross_entropy(x, labels, **args))
    assert fused.rms_norm(torch.empty(3, 0), (0,)).shape == (3, 0)
    assert fused.cross_entropy(torch.empty(0, 8), torch.empty(0, dtype=torch.long)).isnan()


def test_linear_of_every_shape_that_torch_takes():
    w, same = torch.randn(5, 8), dict(gelu=F.gelu, tanh=torch.tanh)
    with fusegrad.strict(False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for args in ((x, w[0]), (x[0], w[0]), (x[0], w[0], w[0, 0]), (x, w, w[0, 0]), (x, w, w[0, :1]), (x, w, torch.randn(4, 5))):
            fusegrad.reset_stats()
            torch.testing.assert_close(fused.linear(*args), F.linear(*args))
            assert sum(fusegrad.stats().values()) == (args[1].dim() == 2)
            for name, act in same.items():
                torch.testing.assert_close(fused.linear(*args, activation=name), act(F.linear(*args)))
    torch.testing.assert_close(fused.linear(x, w[0], w[0, 0]), F.linear(x, w[0]) + w[0, 0])  # torch documents it, and refuses it
    with pytest.raises(RuntimeError, match="strict mode"), fusegrad.strict():
        fused.linear(x, w, w[0, 0])


def test_a_fall_back_compiles():
    w = torch.randn(5, 8)
    with fusegrad.strict(False):
        compiled = torch.compile(lambda x, b: fused.linear(fused.rms_norm(x, (8,), ones.double()), w, b), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, w[0, :1]), F.linear(F.rms_norm(x, (8,)), w, w[0, :1]))


def test_what_has_no_kernel_compiles():
    """By the reference as in eager: complex numbers, and tables of rotary embeddings that are learned."""
    z, learned = torch.complex(x, x.flip(0)).requires_grad_(), torch.randn(4, 8).requires_grad_()
    q = torch.randn(2, 4, 8)
    for f, argument in (
        (lambda z: fused.exp(z) + fused.rms_norm(z, (8,)), z),
        (lambda table: fused.rotary_embedding(q, q, table, table)[0], learned),
    ):
        with fusegrad.strict(False), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results = [g(argument) for g in (f, torch.compile(f, backend="aot_eager", fullgraph=True))]
        cotangent = torch.randn_like(results[0])
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(y, argument, cotangent) for y in results))


@pytest.mark.parametrize("of_input", fusegrad._op.KERNEL_DTYPES)
@pytest.mark.parametrize("of_weight", fusegrad._op.KERNEL_DTYPES)
def test_rms_norm_of_two_dtypes(of_input, of_weight):
    """The result and the gradients have the dtypes that torch's have."""
    z, w = x.to(of_input).requires_grad_(), torch.randn(8).to(of_weight).requires_grad_()
    fusegrad.reset_stats()
    with fusegrad.strict(False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found, expected = fused.rms_norm(z, (8,), w), F.rms_norm(z, (8,), w)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(y.sum(), (z, w)) for y in (found, expected)]
    assert [g.dtype for g in grads[0]] == [of_input, of_weight] == [g.dtype for g in grads[1]]
    kernel = of_weight in (of_input, fusegrad._op.wide_dtype(z))
    assert bool(fusegrad.stats()) is not kernel


def test_ignored_rows_are_not_read():
    """Loss, lse and gradient of an ignored row are 0 even if its logits hold infinities and NaN."""
    bad = x.clone()
    bad[1], bad[3, 2] = float("nan"), float("inf")
    target, kept = torch.tensor([0, -100, 2, -100]), [0, 2]
    bad.requires_grad_()
    for options in (dict(), dict(label_smoothing=0.1, z_loss=0.1), dict(logit_softcap=5.0, weight=torch.rand(8))):
        loss, lse = fused.cross_entropy(bad, target, reduction="none", return_lse=True, **options)
        (g,) = torch.autograd.grad((loss * torch.randn(4) + lse).sum(), bad)
        assert not loss[[1, 3]].any() and not lse[[1, 3]].any() and not g[[1, 3]].any() and g.isfinite().all()
        for reduction in ("mean", "sum"):
            loss = fused.cross_entropy(bad, target, reduction=reduction, **options)
            (g,) = torch.autograd.grad(loss, bad, torch.tensor(1.7))
            alone = x[kept].requires_grad_()
            expected = fused.cross_entropy(alone, target[kept], reduction=reduction, **options)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(g[kept], torch.autograd.grad(expected, alone, torch.tensor(1.7))[0])
            assert not g[[1, 3]].any()


def test_nobody_left():
    target = torch.full((4,), -100)
    z = x.clone().requires_grad_()
    assert fused.cross_entropy(z, target).isnan() and fused.cross_entropy(z, target, empty="zero") == 0
    assert fused.cross_entropy(z, target, reduction="sum") == 0
    for options in (dict(), dict(empty="zero"), dict(reduction="sum")):
        assert not torch.autograd.grad(fused.cross_entropy(z, target, **options), z)[0].any()
    each = fused.cross_entropy(z, target, reduction="none")
    assert not each.any() and not torch.autograd.grad(each, z, torch.randn(4))[0].any()


def test_the_gradient_of_lse_beside_a_divisor_of_0():
    """The loss is over nothing; the partition function has its gradient all the same."""
    for options in (dict(weight=torch.zeros(8)), dict(num_items=torch.tensor(0.0))):
        z, w = x.clone().requires_grad_(), torch.eye(8)
        of_logits = fused.cross_entropy(z, labels, return_lse=True, **options)[1]
        of_features = fused.linear_cross_entropy(z, w, labels, return_lse=True, **options)[1]
        for lse in (of_logits, of_features):
            torch.testing.assert_close(torch.autograd.grad(lse.sum(), z)[0], x.softmax(-1))


def test_micro_batches_add_up():
    """num_items: the gradients of two halves add up to those of the whole batch."""
    z = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1, 2, -100, 4, 5, 6])
    (whole,) = torch.autograd.grad(fused.cross_entropy(z, t), z)
    halves = sum(fused.cross_entropy(z[i], t[i], num_items=5) for i in (slice(0, 3), slice(3, 6)))
    torch.testing.assert_close(torch.autograd.grad(halves, z)[0], whole)


@pytest.mark.parametrize("variable, text", (("sse9", "FUSEGRAD_CPU_CAPABILITY must be one of default"),))
def test_unknown_capability(variable, text):
    import os
    import subprocess
    import sys

    code = "import torch, fusegrad; fusegrad.functional.swiglu(torch.ones(2, 2))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FUSEGRAD_CPU_CAPABILITY": variable}, capture_output=True, text=True
    )
    assert done.returncode and text in done.stderr and "got sse9" in done.stderr


def test_a_soft_cap_of_infinity_is_none():
    assert torch.equal(fused.cross_entropy(x, labels, logit_softcap=float("inf")), fused.cross_entropy(x, labels))


def test_dimensions_of_kernels():
    """Of whoever calls torch.ops."""
    kernels = torch.ops.fusegrad
    for call in (
        lambda: kernels.gated_fwd(x, None, -1, 0),
        lambda: kernels.gated_fwd(x, None, 2, 0),
        lambda: kernels.rms_norm_fwd(x, None, 3, 1e-5, 0.0, False),
        lambda: kernels.rms_norm_fwd(x, None, -1, 1e-5, 0.0, False),
        lambda: kernels.linear_product(x[0, 0], x, None),
    ):
        with pytest.raises((IndexError, RuntimeError), match=" must have "):
            call()
