"""Ops from outside: loaded, held to the contract, and refused where they are wrong. The two of examples/custom_op serve for most."""

import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fusegrad.extension
from fusegrad import _C, _build_info, _op
from fusegrad.testing import check

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "custom_op"
sys.path.append(str(EXAMPLE))

import custom_op  # noqa: E402

NAMES = ("gaussian_gate", "gated_rms_norm")
each = pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.rotating(1))])

pytestmark = pytest.mark.slow  # a compilation takes some 20 s; the next run finds it made


def of(name):
    """The loaded op, its reference and its samples. A second load of the same is quick."""
    return getattr(custom_op, f"load_{name}")(), *(getattr(custom_op, f"{name}_{what}") for what in ("reference", "samples"))


def kernels_run(f):
    """Which functions of an extension's library f() calls."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result = f()
    found = [re.fullmatch(r"fusegrad_\w+_[0-9a-f]{12}::(forward|backward)", event.name) for event in seen.events()]
    return [match.group(1) for match in found if match], result


@each
def test_the_contract(name):
    op, reference, samples = of(name)
    report = check(op, reference, samples)
    report.raise_for_failures()
    assert {f.property for f in report.findings.values() if f.outcome != "pass"} == {"unused_results"}  # of one there are none


def test_a_wrong_derivative_is_seen():
    op, _, samples = of("gaussian_gate")

    def reference(x, z, sharpness):  # the kernel's values, another derivative
        y = op.reference(x, z, sharpness)
        return y + (x * z - (x * z).detach())

    report = check(op, reference, samples, only=["values_and_gradients"])
    assert report["values_and_gradients"].detail.startswith("gradient of ")


def tensors(name, **kwargs):
    shapes = ((6, 40), (6, 40)) if name == "gaussian_gate" else ((6, 40), (6, 40), (40,))
    return [torch.randn(shape, requires_grad=True, **kwargs) for shape in shapes]


@each
def test_first_order_by_the_kernel_higher_by_the_reference(name):
    op, reference, _ = of(name)
    given = tensors(name, dtype=torch.float64)

    def orders(f):
        first = torch.autograd.grad(f(*given).square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), given, create_graph=True)
        return *first, *second, *torch.autograd.grad(sum(g.square().sum() for g in second), given)

    called, found = kernels_run(lambda: orders(op))
    assert called[:2] == ["forward", "backward"] and fusegrad.stats()[name, "the backward is differentiated"] > 0
    torch.testing.assert_close(found, orders(reference))


@each
def test_the_switches_of_fusegrads_own_ops(name, monkeypatch):
    op, reference, _ = of(name)
    given = tensors(name)
    assert kernels_run(lambda: op(*given))[0] == ["forward"]
    with fusegrad.use_reference():
        called, y = kernels_run(lambda: op(*given))
    assert called == [] and torch.equal(y, reference(*given))
    with pytest.raises(RuntimeError, match=f"{name}: there is no kernel for torch.complex64 .strict mode"):
        op(*(t.detach().to(torch.complex64) for t in given))
    monkeypatch.setattr(_op, "_strict", False)
    with pytest.warns(UserWarning, match=f"{name}: there is no kernel for torch.complex64; using the reference"):
        op(*(t.detach().to(torch.complex64) for t in given))
    assert fusegrad.stats() == {(name, "there is no kernel for torch.complex64"): 1}


@each
def test_samples_of_vmap_are_more_rows(name):
    op, reference, _ = of(name)
    given = [t.detach() for t in tensors(name)]
    batched = (0, 0, None)[: len(given)]

    def per_sample(f):
        return torch.func.vmap(torch.func.grad(lambda *ts: f(*ts).sum(), argnums=tuple(range(len(given)))), batched)(*given)

    called, found = kernels_run(lambda: per_sample(op))
    assert {"forward", "backward"} <= {*called} and fusegrad.stats() == {}
    torch.testing.assert_close(found, per_sample(reference))


@pytest.mark.rotating(1)
def test_a_parameter_may_be_none_and_options_have_defaults():
    op, reference, _ = of("gated_rms_norm")
    x, z, w = tensors("gated_rms_norm")
    torch.testing.assert_close(op(x, z), reference(x, z))
    torch.testing.assert_close(op(z=z, x=x, eps=0.5), reference(x, z, None, 0.5))
    torch.testing.assert_close(op(x, z, weight=w), reference(x, z, w))
    half = [x.bfloat16(), z.bfloat16(), w]  # a parameter in float32 beside 16-bit rows, as for the norms
    assert op(*half).dtype is torch.bfloat16


@pytest.mark.rotating(1)
def test_unneeded_gradients_are_not_computed():
    op, _, _ = of("gated_rms_norm")
    x, z, w = (t.detach() for t in tensors("gated_rms_norm"))
    expected = torch.autograd.grad(op(*(ts := [t.clone().requires_grad_() for t in (x, z, w)])).sum(), ts)
    for i in range(3):
        ts = [x, z, w]
        ts[i] = ts[i].clone().requires_grad_()
        (found,) = torch.autograd.grad(op(*ts).sum(), ts[i])
        assert torch.equal(found, expected[i])
    library = op.fn.library
    results = getattr(torch.ops, library).backward([x], [x, z, w], [0, 1, 2], [x.new_ones(6)], [1e-5], [2])
    assert [y.shape for y in results] == [(40,)]


def test_large_results_come_from_a_pool_that_can_be_emptied():
    op, _, _ = of("gaussian_gate")
    library = getattr(torch.ops, op.fn.library)
    fusegrad.empty_cache()
    op(torch.randn(2048, 1024), torch.randn(2048, 1024))
    assert library.pool_kept() >= 2048 * 1024 * 4
    fusegrad.empty_cache()
    assert library.pool_kept() == 0


def test_a_second_load_compiles_nothing(monkeypatch):
    first = custom_op.load_gaussian_gate()
    monkeypatch.setattr(fusegrad.extension, "_compile", None)
    again = custom_op.load_gaussian_gate()
    assert again is not first and again.fn.library == first.fn.library
    assert again.__name__ == "gaussian_gate" and again.reference is custom_op.gaussian_gate_reference
    other = fusegrad.extension.load("gaussian_gate", EXAMPLE / "gaussian_gate.h", lambda x, z, sharpness=2.0: x)  # no new kernels
    assert other(torch.ones(1), torch.ones(1)).item() == pytest.approx(0.1353353)


@each
def test_overrides(name):
    class Duck:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func, args

    op, _, _ = of(name)
    duck, *rest = Duck(), *tensors(name)[1:]
    assert op(duck, *rest) == (op, (duck, *rest))


@each
def test_dtensors(name):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        op, _, _ = of(name)
        given = [t.detach() for t in tensors(name)]
        for placement in (Shard(0), Shard(1)):
            parts = [distribute_tensor(t, mesh, [placement]) for t in given[:2]]
            y = op(*parts, *(distribute_tensor(t, mesh) for t in given[2:]))
            assert torch.equal(y.full_tensor(), op(*given))
            assert (y.placements == (placement,)) == (placement == Shard(0) or name == "gaussian_gate")  # a row is needed whole
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "call, error, text",
    {
        "shape": (lambda f, t: f(t(5, 33), t(5, 1)), RuntimeError, r"gaussian_gate: z must have shape \[5, 33\], got \[5, 1\]"),
        "dtype": (lambda f, t: f(t(5), t(5).double()), TypeError, "gaussian_gate: z must be Float, got Double"),
        "integers": (lambda f, t: f(t(5).long(), t(5).long()), TypeError, "gaussian_gate: input must be a floating-point tensor"),
        "no tensor": (lambda f, t: f(t(5), 2.0), TypeError, "gaussian_gate: z must be a Tensor, got float"),
        "none": (lambda f, t: f(t(5), None), TypeError, "gaussian_gate: z must be a Tensor, got NoneType"),
        "option": (lambda f, t: f(t(5), t(5), t(1)), TypeError, r"gaussian_gate: sharpness must be a number \(no gradient flows to it\)"),
        "missing": (lambda f, t: f(t(5)), TypeError, r"gaussian_gate: takes \(x, z, sharpness=1.0\), got 1 by position and none by name"),
        "unknown": (lambda f, t: f(t(5), t(5), sharp=2.0), TypeError, r"gaussian_gate: takes .*, got 2 by position and sharp by name"),
        "too many": (lambda f, t: f(t(5), t(5), 1.0, 2.0), TypeError, r"gaussian_gate: takes .*, got 4 by position"),
    }.values(),
)
def test_bad_calls(call, error, text):
    op, _, _ = of("gaussian_gate")
    with pytest.raises(error, match=text):
        call(op, torch.randn)


@pytest.mark.rotating(1)
def test_a_row_needs_a_dimension():
    op, _, _ = of("gated_rms_norm")
    with pytest.raises(RuntimeError, match="gated_rms_norm: x must have at least one dimension, got none"):
        op(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"gated_rms_norm: weight must have shape \[4\]"):
        op(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3))


HEADER = EXAMPLE / "gaussian_gate.h"
REFERENCE = custom_op.gaussian_gate_reference


@pytest.mark.parametrize(
    "arguments, error, text",
    {
        "name": (("my op", HEADER, REFERENCE), ValueError, "extension: name must be an identifier, got 'my op'"),
        "no name": ((None, HEADER, REFERENCE), ValueError, "extension: name must be an identifier, got None"),
        "header": (("my_op", "missing.h", REFERENCE), FileNotFoundError, "extension: header must be a file, got .*missing.h"),
        "functors": (
            ("my_op", HEADER, REFERENCE),
            ValueError,
            r"extension: gaussian_gate.h must have a struct MyOpFwd \(the functors of my_op\), got GaussianGateFwd, GaussianGateBwd",
        ),
        "reference": (("gaussian_gate", HEADER, None), TypeError, "extension: reference must be callable, got NoneType"),
        "any number": (
            ("gaussian_gate", HEADER, lambda *args: args),
            TypeError,
            r"extension: reference must take a fixed number of arguments by position, got \(\*args\)",
        ),
    }.values(),
)
def test_bad_loads(arguments, error, text):
    with pytest.raises(error, match=text):
        fusegrad.extension.load(*arguments)


def test_cuda_that_cannot_be_built_is_an_error():
    if not _C.with_cuda:
        with pytest.raises(RuntimeError, match="extension: cuda=True needs a fusegrad with CUDA kernels"):
            fusegrad.extension.load("gaussian_gate", HEADER, REFERENCE, cuda=True)


def test_without_a_compiler(tmp_path, monkeypatch):
    header = tmp_path / "gaussian_gate.h"  # another path: not compiled yet
    header.write_text(HEADER.read_text())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"extension: a C\+\+ compiler is needed, and there is no no-such-compiler: install"):
        fusegrad.extension.load("gaussian_gate", header, REFERENCE, build_directory=tmp_path)


def test_what_does_not_fit_is_said_by_the_compiler(tmp_path):
    """A reference of other arguments than the functors read; what the compiler says comes through."""
    with pytest.raises(
        RuntimeError, match=r"extension: gaussian_gate.cpp does not compile: the reference must take in \+ params tensors, then"
    ):
        fusegrad.extension.load("gaussian_gate", HEADER, lambda x, z: x, build_directory=tmp_path)


TWO_RESULTS = """\
#include <fusegrad.h>

namespace fusegrad {
struct PolarFwd : MapOp {
  static constexpr int in = 2, out = 2;
  template <class A>
  FUSEGRAD_FN void map(const In<PolarFwd, A>& in, Out<PolarFwd, A>& out) const {
    out.y[0] = in.x[0] * in.x[0] + in.x[1] * in.x[1];
    out.y[1] = in.x[0] * in.x[1];
  }
};
struct PolarBwd : MapOp {
  static constexpr int in = 4, out = 2;
  template <class A>
  FUSEGRAD_FN void map(const In<PolarBwd, A>& in, Out<PolarBwd, A>& out) const {
    out.y[0] = A(2) * in.x[0] * in.x[2] + in.x[1] * in.x[3];
    out.y[1] = A(2) * in.x[1] * in.x[2] + in.x[0] * in.x[3];
  }
};
}  // namespace fusegrad
"""


@pytest.mark.rotating(0)
def test_several_results(tmp_path):
    (tmp_path / "polar.h").write_text(TWO_RESULTS)

    def reference(x, z):
        a, b = fusegrad.extension.wide(x), fusegrad.extension.wide(z)
        return (a * a + b * b).to(x.dtype), (a * b).to(x.dtype)

    op = fusegrad.extension.load("polar", tmp_path / "polar.h", reference, build_directory=tmp_path / "built")
    some = ["values_and_gradients", "gradgradcheck", "unused_results", "unneeded_gradients", "vmap", "opcheck", "compile_fullgraph"]
    report = check(op, reference, lambda make: [(make(5, 33), make(5, 33))], only=some)
    report.raise_for_failures()
    assert report["unused_results"].outcome == "pass"


CUBED_RELU = """\
#include <fusegrad.h>

namespace fusegrad {
struct CubedReluFwd : MapOp {
  static constexpr int in = 1, out = 1;
  template <class A>
  FUSEGRAD_FN void map(const In<CubedReluFwd, A>& in, Out<CubedReluFwd, A>& out) const {
    const A r = larger(in.x[0], A(0));
    out.y[0] = r * r * r;
  }
};
struct CubedReluBwd : MapOp {
  static constexpr int in = 2, out = 1;
  template <class A>
  FUSEGRAD_FN void map(const In<CubedReluBwd, A>& in, Out<CubedReluBwd, A>& out) const {
    const A r = larger(in.x[0], A(0));
    out.y[0] = in.x[1] * A(3) * r * r;
  }
};
}  // namespace fusegrad
"""
A_FEW = functools.partial(check, only=["values_and_gradients", "layouts", "gradgradcheck"])


@pytest.mark.rotating(0)
def test_the_example_of_the_docstring(tmp_path, monkeypatch):
    (tmp_path / "cubed_relu.h").write_text(CUBED_RELU)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(fusegrad.testing, "check", A_FEW)  # the others are those of any map op
    scope = dict(fusegrad=fusegrad)
    exec(textwrap.dedent(inspect.getdoc(fusegrad.extension.load).split("Example::\n")[1]), scope)
    assert scope["cubed"](torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 8.0]


@pytest.mark.rotating(1)
def test_the_example_as_it_is_started(monkeypatch, capsys):
    """What it says of each op: the properties, and time and memory beside torch code, of which the fused op keeps none."""
    monkeypatch.setattr(custom_op, "check", A_FEW)
    custom_op.main()
    said = capsys.readouterr().out
    measured = re.findall(r"^(\w+) of 2048 x 2048 on \w+, (\w+): [\d.]+ ms forward and backward, (\d+) MB kept$", said, re.M)
    assert [words[:2] for words in measured] == [(name, what) for name in NAMES for what in ("fused", "torch")]
    assert all(int(kept) == 0 if what == "fused" else int(kept) > 0 for _, what, kept in measured)
    assert said.count("3 pass, 0 fail") == 2


@pytest.mark.rotating(2)
@pytest.mark.parametrize("name", NAMES)
def test_emulated(name):
    """The CUDA kernels, run on the CPU, in orders of threads that change."""
    from emulator import build

    flags = [*_build_info.FLAGS["default"], "-O1", "-DFUSEGRAD_EMULATED", *(f"-I{path}" for path in fusegrad.extension.include_paths())]
    _, reference, samples = of(name)
    library, sources = fusegrad.extension._sources(name, EXAMPLE / f"{name}.h", reference, flags)
    path = build.library(library, sources, flags)
    torch.ops.load_library(path)
    fusegrad.extension._declare(library)
    op, emulator = fusegrad.extension._function(name, reference, library, cuda=False), build.control(path)
    for seed in range(2):
        emulator.fusegrad_emulator_seed(seed)
        some = ["values_and_gradients", "layouts", "sizes", "special_values", "backward_twice_and_bits", "unneeded_gradients"]
        check(op, reference, samples, only=some).raise_for_failures()
        assert emulator.fusegrad_emulator_launches() > 0


if shutil.which("nvcc"):

    @pytest.mark.rotating(0)
    @pytest.mark.parametrize("name", NAMES)
    def test_nvcc(name, tmp_path):
        """The CUDA source compiles without a warning, and its kernels keep to their registers."""
        from test_nvcc import kernels, run
        from torch.utils.cpp_extension import include_paths

        library, sources = fusegrad.extension._sources(name, EXAMPLE / f"{name}.h", of(name)[1], [])
        source, ptx = tmp_path / f"{name}_cuda.cu", tmp_path / "kernels.ptx"
        source.write_text(sources[source.name])
        include = [*(f"-I{path}" for path in fusegrad.extension.include_paths()), *(f"-isystem={path}" for path in include_paths())]
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
        run("nvcc", *flags, "-ptx", "-arch=compute_90", *include, source, "-o", ptx)
        said = run("ptxas", "-arch=sm_90", "-O3", "-v", "--warning-as-error", ptx, "-o", tmp_path / "kernels.cubin")
        found = kernels(ptx.read_text(), said)
        assert {key[1] for key in found} >= {f"{functor}{way}" for functor in [name.title().replace("_", "")] for way in ("Fwd", "Bwd")}
        assert not [key for key, (_, _, spills) in found.items() if spills]


def test_an_installed_package_has_the_headers(tmp_path):
    """What a wheel takes along is all that a loaded op includes."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    include = tmp_path / "fusegrad" / "include"
    _, sources = fusegrad.extension._sources("gaussian_gate", HEADER, REFERENCE, [])
    due, seen = [include / "fusegrad.h", *(include / re.search('"(extension/.*)"', text)[1] for text in sources.values())], set()
    while due:
        path = due.pop()
        if path not in seen:
            seen.add(path)
            due += [path.parent / name for name in re.findall(r'^#include "(.*)"', path.read_text(), re.M)]
    assert {path.name for path in seen} >= {"fusegrad.h", "map_cpu.h", "rows_cuda.cuh", "numeric.h", "pool.cpp", "view.cpp"}
    code = "import fusegrad.extension as e; print(e.include_paths())"
    # The compiled part is the one at hand.
    (tmp_path / "fusegrad" / Path(_C.__file__).name).symlink_to(_C.__file__)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and str(include) in done.stdout, done.stderr


def test_the_docs_show_the_example():
    page = (ROOT / "docs" / "extension.md").read_text()
    blocks = re.findall(r"^```cpp\n(.*?)^```$", page, re.M | re.S)
    assert HEADER.read_text() in blocks
