"""fusegrad.testing.check: what it finds in layers written in the styles of the field, and that it passes what is right."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import Function

import fusegrad
from fusegrad import _C
from fusegrad.testing import PROPERTIES, check
from table import BF16, F32, F64

ROOT = Path(__file__).resolve().parent.parent


def rms_norm_reference(x, w, eps):
    a = x.to(torch.promote_types(x.dtype, F32))
    return (a * torch.rsqrt(a.square().mean(-1, keepdim=True) + eps) * w).to(x.dtype)


def rms_norm_samples(make):
    return [(make(5, 33), make.param(33), 1e-5), (make(4, 9, layout="transposed"), make.param(9), 1e-3)]


def cross_entropy_samples(make):
    return [(make(6, 17), make.labels(6, classes=17))]


def cube_samples(make):
    return [(make(3, 17),), (make(3, 18, layout="row_strided"),)]


class StoredGradient(Function):
    """Style of Liger-Kernel: a loss whose forward writes the gradient over the logits, by a kernel that no version counter sees, and
    whose backward scales it where it lies."""

    @staticmethod
    def forward(ctx, logits, target):
        logs = logits.to(torch.promote_types(logits.dtype, F32)).log_softmax(-1)
        loss = torch.nn.functional.nll_loss(logs, target).to(logits.dtype)
        grad = logs.exp().scatter_add_(-1, target[:, None], -torch.ones_like(logs[:, :1])) / len(target)
        ctx.stored = logits.data.copy_(grad)
        return loss

    @staticmethod
    def backward(ctx, g):
        return ctx.stored.mul_(g), None


class RawKernels(Function):
    """Style of apex: compiled functions called from both, which the graph does not see, and every gradient always."""

    @staticmethod
    def forward(ctx, x, w, eps):
        y, rstd = _C.rms_norm_fwd(x, w, 1, eps, 0.0, False)
        ctx.save_for_backward(x, w, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, rstd = ctx.saved_tensors
        return *_C.rms_norm_bwd(dy, x, w, rstd, 1, 0.0, (True, True)), None


class NaiveCube(Function):
    """A derivative that the forward computed, outside of the graph, and left on the context."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x * x
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


class Forgetful(Function):
    """The input on the context where no version counter guards it, and the result, which keeps the context alive."""

    @staticmethod
    def forward(ctx, x):
        ctx.x, ctx.y = x, x * x * x
        return ctx.y

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.x * ctx.x * g


class Shared(Function):
    """One context for all calls."""

    @staticmethod
    def forward(ctx, x):
        Shared.x = x
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        return 3 * Shared.x * Shared.x * g


@torch.library.custom_op("fusegrad_test::cube", mutates_args=())
def library_cube(x: torch.Tensor) -> torch.Tensor:
    return x * x * x


@torch.library.custom_op("fusegrad_test::cube_backward", mutates_args=())
def library_cube_backward(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 3 * x * x * g


library_cube.register_fake(torch.empty_like)
library_cube_backward.register_fake(lambda g, x: torch.empty_like(x))
library_cube.register_autograd(
    lambda ctx, g: library_cube_backward(g, *ctx.saved_tensors), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class AddInto(Function):
    """The sum takes the place of the residual, unannounced."""

    @staticmethod
    def forward(ctx, x, residual):
        return residual.data.add_(x).clone()

    @staticmethod
    def backward(ctx, g):
        return g, g


class Peer(torch.nn.Module):
    """A layer of somebody else, which overwrites its input."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, residual):
        self.calls += 1
        return AddInto.apply(x, residual) * self.weight


TRANSFORMS = {"jvp", "vmap", "per_sample_gradients", "hessian", "forward_mode"}
SILENT = {"gradient_penalty", "no_silent_second_order"}
CUBE = (lambda x: x * x * x, cube_samples)
STYLES = dict(
    stored_gradient=(StoredGradient.apply, torch.nn.functional.cross_entropy, cross_entropy_samples),
    raw_kernels=(RawKernels.apply, rms_norm_reference, rms_norm_samples),
    naive=(NaiveCube.apply, *CUBE),
    forgetful=(Forgetful.apply, *CUBE),
    shared=(Shared.apply, *CUBE),
    library=(library_cube, *CUBE),
)
# In float64 and float32. That gradgradcheck passes the first is its fast mode, which does not see a second order so small.
FAILS = dict(
    stored_gradient=TRANSFORMS
    | SILENT
    | {"layouts", "backward_twice_and_bits", "nothing_of_the_caller_changes", "changes_after_the_forward", "batched_cotangents"}
    | {"lazy_bits", "checkpoint_and_saved_tensor_hooks", "hooks"},
    raw_kernels=TRANSFORMS | SILENT | {"gradgradcheck", "unneeded_gradients", "compile_fullgraph"},
    naive=TRANSFORMS | SILENT | {"gradgradcheck"},
    forgetful=TRANSFORMS | {"changes_after_the_forward", "results_leave_nothing_behind"},
    shared=TRANSFORMS | {"interleaved_calls", "changes_after_the_forward", "results_leave_nothing_behind", "compile_fullgraph"},
    library=TRANSFORMS - {"vmap"} | {"gradient_penalty", "gradgradcheck"},  # an error, so that it is not silent
)


@pytest.mark.parametrize("style", STYLES)
def test_what_each_style_breaks(style):
    report = check(*STYLES[style], dtypes=(F64, F32))
    assert set(report.failures) == FAILS[style]
    for name in SILENT & FAILS[style]:
        assert "second order, gradient of" in report[name].detail or style == "library"
    for finding in report.failures.values():
        assert "strides [" in finding.example and finding.detail and finding.trace


def table_of_styles():
    """What docs/testing.md shows of them: a row for each property that one of them breaks."""
    rows = [["property", *(style.replace("_", " ") for style in STYLES)], ["---"] * (1 + len(STYLES))]
    broken = set().union(*FAILS.values())
    rows += [[f"`{name}`", *("fails" if name in FAILS[style] else "" for style in STYLES)] for name in PROPERTIES if name in broken]
    rows.append(["of these", *(str(len(FAILS[style])) for style in STYLES)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_g4_the_docs_show_what_each_style_breaks():
    page = (ROOT / "docs" / "testing.md").read_text()
    assert f"\n\n{table_of_styles()}\n" in page, table_of_styles()
    for style in STYLES:
        assert f"**{style.replace('_', ' ')}**" in page


def test_counter_examples_name_the_error_and_the_call():
    report = check(NaiveCube.apply, *CUBE, only=["gradient_penalty", "values_and_gradients"])
    finding = report["gradient_penalty"]
    assert re.match(r"second order, gradient of x: error \d.* is over the budget \d.*e-0\d \(value .*, reference .*\)", finding.detail)
    assert finding.example == "sample 0: x=float64[3, 17] strides [17, 1]"
    # Two roundings in 16 bits are one too many.
    assert "float16" in report["values_and_gradients"].example and "over the budget" in report["values_and_gradients"].detail


class TwoResults(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx, g, h):
        return 2 * g + 3 * h


class Product(Function):
    """Its two gradients are not one without the other."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (g * w if ctx.needs_input_grad[1] else g.to(BF16).to(g) * w), g * x


class WrongSlope(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


@torch.library.custom_op("fusegrad_test::wrong_fake", mutates_args=())
def wrong_fake(x: torch.Tensor) -> torch.Tensor:
    return x * x


wrong_fake.register_fake(lambda x: x.new_empty(x.shape[0]))


def not_empty(x):
    if not len(x):
        raise RuntimeError("an empty grid")
    return x * x


def without_autocast(x):
    with torch.autocast("cpu", enabled=False):
        return x @ x.mT


FAULTS = dict(
    values_and_gradients=(lambda x: 1.0001 * x * x, lambda x: x * x, cube_samples),
    sizes=(not_empty, lambda x: x * x, cube_samples),
    special_values=(lambda x: x.nan_to_num() * x, lambda x: x * x, cube_samples),
    gradcheck=(WrongSlope.apply, lambda x: x * x, cube_samples),
    subsets_of_requires_grad=(Product.apply, lambda x, w: x * w, lambda make: [(make(4, 5), make.param(5))]),
    unused_results=(TwoResults.apply, lambda x: (2 * x, 3 * x), cube_samples),
    opcheck=(wrong_fake, lambda x: x * x, cube_samples),
    autocast_dtype=(without_autocast, lambda x: x @ x.mT, cube_samples),
    meta_device=(lambda x: x * x.abs().max().item(), lambda x: x * x.detach().abs().max(), cube_samples),
)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    assert set(check(*FAULTS[name], only=[name]).failures) == {name}


def test_every_property_is_seen_to_fail():
    assert set().union(FAULTS, *FAILS.values()) == set(PROPERTIES)


def test_what_is_right_passes():
    def ours(x, w, eps):
        return fusegrad.functional.rms_norm(x, x.shape[-1:], w, eps)

    report = check(ours, rms_norm_reference, rms_norm_samples, dtypes=(F64, F32, (BF16, F32)))
    report.raise_for_failures()
    assert [k for k, f in report.findings.items() if f.outcome == "not applicable"] == ["unused_results"]
    assert report.title == "ours: 28 pass, 0 fail, 1 not applicable"


def test_modules_with_buffers():
    """Parameters are arguments, running statistics the module's own to change, and the caller's modules stay as they were."""
    ours, theirs, samples = fusegrad.nn.BatchNorm1d(6), torch.nn.BatchNorm1d(6), [{"input": torch.randn(7, 6)}]
    only = [
        "values_and_gradients",
        "sizes",
        "gradgradcheck",
        "gradient_penalty",
        "unneeded_gradients",
        "nothing_of_the_caller_changes",
        "hooks",
    ]
    report = check(ours, theirs, samples, only=only)
    report.raise_for_failures()
    assert {f.outcome for f in report.findings.values()} == {"pass"}
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 0
    wrong = check(ours, torch.nn.BatchNorm1d(6, eps=0.1), samples, only=only[:1])
    assert "input=float64[7, 6] strides [6, 1], weight=float64[6] strides [1]" in wrong[only[0]].example


def test_what_the_reference_cannot_do_does_not_apply():
    def raises(x):
        assert not torch._C._functorch.is_batchedtensor(x), "no vmap here"
        return x * 1

    finding = check(torch.clone, raises, cube_samples, only=["vmap"])["vmap"]
    assert (finding.outcome, finding.detail) == ("not applicable", "the reference does not do that: AssertionError")


def test_labels_follow_the_rows():
    """A reference that would take other rows with the old labels is not asked to."""

    def gathered(x, target):
        return -torch.log_softmax(x, -1).gather(1, target[:, None]).mean()

    check(fusegrad.functional.cross_entropy, gathered, cross_entropy_samples, only=["sizes"]).raise_for_failures()


def test_a_peer_that_writes_to_its_input():
    """Named as that; and of the caller's nothing changes."""
    torch.manual_seed(3)
    layer = Peer()
    samples = [(torch.randn(4, 5, requires_grad=True), torch.randn(3, 4, 5)[1])]
    mine = {**dict(enumerate(samples[0])), **layer.state_dict(keep_vars=True)}
    before = {k: (v.detach().clone(), v._version) for k, v in mine.items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    report = check(layer, lambda x, residual, weight, calls: (x + residual) * weight, samples, dtypes=(F64, F32))
    assert report["nothing_of_the_caller_changes"].detail == "argument residual was changed by the forward"
    assert report["values_and_gradients"].outcome == "pass"  # what it computes is right
    for k, (value, version) in before.items():
        assert torch.equal(mine[k], value) and mine[k]._version == version and mine[k].grad is None
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


X = torch.randn(3, 4)


@pytest.mark.parametrize(
    "args, options, error",
    (
        ((3, torch.exp, [(X,)]), {}, "fn must be callable, got int"),
        ((torch.exp, None, [(X,)]), {}, "reference must be callable, got NoneType"),
        ((torch.exp, torch.exp, []), {}, "samples must be tuples of arguments, .* got none"),
        ((torch.exp, torch.exp, [X]), {}, "samples must be tuples of arguments, .* got Tensor"),
        ((torch.exp, torch.exp, [(X,), {"input": X}]), {}, "samples must be .* got Sample, tuple"),
        ((torch.exp, torch.exp, [(X.long(),)]), {}, r"samples must have a floating-point tensor .*, got sample 0: .*=int64\[3, 4\]"),
        ((torch.exp, torch.exp, [(X, X, X)]), {}, "reference must take the samples, got TypeError of sample 0"),
        ((torch.exp, torch.exp, [(X,)]), {"only": "gradcheck"}, "only must be a list of names, got 'gradcheck'"),
        ((torch.stack, torch.stack, [([X, X],)]), {}, "samples must have .* .lists are not looked into."),
        ((torch.exp, torch.exp, [(X,)]), {"only": ["gradchek"]}, "only must be of values_and_gradients, .* got 'gradchek'"),
        ((torch.exp, torch.exp, [(X,)]), {"skip": ["all"]}, "skip must be of values_and_gradients, .* got 'all'"),
        ((torch.exp, torch.exp, [(X,)]), {"unit": 3}, "description must be of constants, .* got 'unit'"),
        ((torch.exp, torch.exp, [(X,)]), {"dtypes": (torch.int8,)}, "dtypes must be of float64, .* got torch.int8"),
        ((torch.exp, torch.exp, [(X,)]), {"dtypes": ()}, "dtypes must be of float64, .* got none"),
        ((torch.exp, torch.exp, [(X,)]), {"dtypes": [(BF16, F32)]}, "a pair of dtypes needs samples that is a function of make"),
    ),
)
def test_bad_input(args, options, error):
    with pytest.raises((TypeError, ValueError), match=f"^check: {error}"):
        check(*args, **options)


def test_what_a_callable_returns():
    with pytest.raises(AssertionError, match="a Tensor or a tuple of Tensors must be returned, got dict"):
        check(lambda x: {"y": x}, lambda x: x, [(X,)], only=["values_and_gradients"]).raise_for_failures()
    with pytest.raises(AssertionError, match="no result requires grad"):
        check(lambda x: x.detach() * 1, lambda x: x, [(X,)], only=["values_and_gradients"]).raise_for_failures()


def test_tables(capsys, monkeypatch):
    report = check(NaiveCube.apply, *CUBE, only=["gradcheck", "gradient_penalty", "opcheck"])
    assert "gradcheck         pass" in str(report) and "opcheck           not applicable  no op of torch.library is called" in str(report)
    report.print()
    drawn = capsys.readouterr().out
    assert "NaiveCube: 1 pass, 1 fail, 1 not applicable" in drawn and "┃ property" in drawn and "float64[3, 17]" in drawn
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.print()
    assert capsys.readouterr().out == f"{report}\n"
    with pytest.raises(
        AssertionError, match=r"(?s)NaiveCube: 1 pass, 1 fail.*--- gradient_penalty\nTraceback.*AssertionError: second order"
    ):
        report.raise_for_failures()


def test_the_docs_name_every_property():
    page = (ROOT / "docs" / "testing.md").read_text()
    for name, prop in PROPERTIES.items():
        assert f"`{name}`" in page and prop.holds.__doc__, name
