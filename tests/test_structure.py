"""The rules of the house, as facts: where things lie, what they are called, what may include what."""

import ast
import inspect
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch

import fusegrad
from fusegrad._op import OPS
from table import call, draw, names

ROOT = Path(__file__).resolve().parent.parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "python" / "fusegrad"
each_op = pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)


def includes(path):
    return re.findall(r'^#include [<"](.+?)[>"]', path.read_text(), re.M)


def camel(op):
    """RMSNorm of rms_norm: the op's name as its Function writes it."""
    name = op.fn.__name__.removesuffix("Fn")
    assert name.lower() == op.name.replace("_", "")
    return name


def kernel_families(op):
    """The families whose kernels it calls: its own, if it has any."""
    return {kernel.rpartition("_")[0] for kernel in op.kernels}


def functors(family):
    """The file of the functors that a family's host functions run: their own, or those of the op whose header they include."""
    own = [name.removesuffix(".h") for name in includes(CSRC / "ops" / f"{family}.cpp") if "/" not in name and name != "ops.h"]
    return family if family in own else own[0]


def test_nobody_waits_for_a_device():
    """Calls that read a tensor's numbers stand in one line with the question whether it is on the CPU. (Of `if tensor:` and masks as
    indices only torch.cuda.set_sync_debug_mode knows, on a GPU: test_cuda.py.)"""
    files = [*CSRC.rglob("*.cpp"), *CSRC.rglob("*.h"), *(PACKAGE / "ops").glob("*.py"), PACKAGE / "_op.py", PACKAGE / "_autograd.py"]
    waits = re.compile(r"\.item\(|\.item<|\.tolist\(|\.cpu\(|\.nonzero\(|local_scalar_dense|synchronize\(")
    found = [(path.name, line.strip()) for path in files for line in path.read_text().splitlines() if waits.search(line)]
    assert found and all("is_cpu()" in line for _, line in found), found


@each_op
def test_an_op_is_its_own_files(op):
    for family in kernel_families(op):
        assert (CSRC / "ops" / f"{family}.cpp").exists()
        for suffix in (".h", "_cpu.cpp", "_cuda.cu"):
            assert (CSRC / "ops" / (functors(family) + suffix)).exists()
    assert (PACKAGE / "ops" / f"{op.family}.py").exists()


@each_op
def test_one_name_everywhere(op):
    module, name = inspect.getmodule(op.functional), camel(op)
    assert op.functional.__name__ == op.name and op.reference.__name__ == f"{op.name}_reference"
    assert op.fn.__name__ == f"{name}Fn" and op.fn.op == op.name and op.fn.reference is op.reference
    assert getattr(fusegrad.functional, op.name) is op.functional
    assert module.__name__ == op.fn.__module__ == f"fusegrad.ops.{op.family}"
    if op.module is not None:
        torchs = issubclass(op.module, getattr(torch.nn, op.module.__name__, ()))  # which is not always called after the function
        assert getattr(fusegrad.nn, op.module.__name__) is op.module
        assert torchs or op.module.__name__.startswith(name) or f"`{op.name}`" in op.module.__doc__
    for family in kernel_families(op):
        header = (CSRC / "ops" / f"{functors(family)}.h").read_text()
        assert re.search(r"struct \w+Fwd", header)
        sisters = "".join((CSRC / "ops" / name).read_text() for name in re.findall(r'#include "(\w+\.h)"', header))
        assert re.search(r"struct \w+Bwd", header + sisters)
    bindings = (CSRC / "bindings.cpp").read_text()
    for kernel in op.kernels:
        assert re.search(rf"_\({kernel},", bindings)


@each_op
def test_an_op_is_named_nowhere_else(op):
    """A new op touches the binding list and the export; tests and drivers know it only by the table."""
    shared = [*CSRC.glob("core/*"), *CSRC.glob("host/*"), *PACKAGE.glob("_*.py"), *PACKAGE.glob("testing/*.py")]
    for path in shared:
        if path.name not in ("_build_info.py", "_activations.py"):  # an activation may have the name of an op
            code = re.sub(r"//.*|#.*|\"\"\".*?\"\"\"", "", path.read_text(), flags=re.S if path.suffix == ".py" else 0)
            assert not re.search(rf"[\"']{op.name}[\"']|\b({'|'.join(op.kernels)}|{camel(op)}(Fn|Fwd|Bwd))\b", code), path


@each_op
def test_functional_takes_torchs_arguments_first(op):
    native = getattr(torch.nn.functional, op.name, None)
    if native is None or inspect.isbuiltin(native):  # which has no signature to look at
        return
    ours = inspect.signature(op.functional).parameters
    theirs = inspect.signature(native).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == q.default and ours[name].kind is q.kind for name, q in theirs.items())
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])


def test_rings_only_call_inwards():
    for path in CSRC.rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        for name in includes(path):
            ring1 = (
                path.parent.name == "core"
                or path.suffix in (".cu", ".cuh")
                or (path.parent.name == "ops" and path.stem != "ops" and path.suffix == ".h")
            )
            if ring1:
                allowed = ("torch/headeronly/", "ATen/cpu/vec/", "ATen/Parallel.h", "cuda_runtime.h", "../core/")
                own = (path.parent / name).exists() or "/" not in name
                assert own or name.startswith(allowed), f"{path.name} includes {name}"
            if path.suffix in (".cu", ".cuh"):
                assert not name.startswith(("ATen", "c10", "torch/csrc")), f"{path.name} includes {name}"
            if name.startswith(("torch/", "pybind11")) and not name.startswith("torch/headeronly/"):
                registers = path == CSRC / "bindings.cpp" or path.parent == CSRC / "extension"
                assert registers, f"{path.name} includes {name}: slow to compile"
            assert name != "ATen/ATen.h", path


def test_object_files_do_not_collide():
    """torch's build names an object file after its source without the suffix."""
    sources = [path.with_suffix("") for path in CSRC.rglob("*") if path.suffix in (".cpp", ".cu")]
    assert len(set(sources)) == len(sources)


def test_indices_are_64_bits():
    for path in CSRC.rglob("*.*"):
        for line in path.read_text().splitlines():
            narrow = re.search(r"\bint\s+\w+\s*=[^;]*\b(numel|sizes?|strides?|rows|cols)\b", line.split("//")[0].replace("::size()", ""))
            assert not narrow, f"{path.name}: {line}"


def test_every_check_has_a_text():
    for path in CSRC.rglob("*.*"):
        for match in re.finditer(r"TORCH_CHECK\w*\(([^;]*)\);", path.read_text(), re.S):
            assert '"' in match.group(1), f"{path.name}: {match.group(0)[:80]}"


def test_no_tensor_is_kept_on_a_context():
    """Tensors go through save_for_backward; what is put on ctx is a plain value."""
    for path in PACKAGE.glob("ops/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ctx":
                known = {"options", "save_for_backward", "saved_tensors", "needs_input_grad", "mark_non_differentiable"}
                assert node.attr in known | {"set_materialize_grads", "divisor_is_given", "shape", "dtype"}, f"{path.name}: ctx.{node.attr}"


def test_kernels_say_their_name_to_the_profiler():
    for op in OPS.values():
        for kernel in op.kernels:
            text = (CSRC / "ops" / f"{kernel.rpartition('_')[0]}.cpp").read_text()
            assert f'RECORD_FUNCTION("fusegrad::{kernel}"' in text


@each_op
def test_docstrings_are_complete(op):
    complete(op.functional)


def complete(documented):
    text = inspect.getdoc(documented)
    for heading in ("Args:", "Returns:", "Raises:", "Equivalent eager code::", "Saved for backward"):
        assert heading in text, heading
    assert re.search(r"Sources?:", text) and ".. math::" in text


def eager_code(documented):
    return textwrap.dedent(inspect.getdoc(documented).split("Equivalent eager code::")[1].split("Source")[0])


@pytest.mark.parametrize("mlp", [fusegrad.nn.MLP((3, 5, 4, 2)), fusegrad.nn.GatedMLP(3, 4)], ids=["MLP", "GatedMLP"])
def test_docstring_code_is_the_module(mlp):
    complete(type(mlp))
    scope = dict(mlp=mlp, x=torch.randn(7, 3), torch=torch)
    expected = mlp(scope["x"])
    exec(eager_code(type(mlp)), scope)
    torch.testing.assert_close(scope["y"], expected)


@each_op
def test_docstring_code_is_the_op(op):
    """The eager code of the docstring, run on the op's first sample, gives its result."""
    code = eager_code(op.functional)
    sample = draw(op, names(op)[0])
    scope = {k: p.default for k, p in inspect.signature(op.functional).parameters.items()} | sample.kwargs | {"torch": torch}
    torch.manual_seed(17)
    exec(code, scope)
    torch.testing.assert_close(scope["y"], call(op, sample)[0])


def test_variants_do_not_share_code(tmp_path):
    """Code compiled for AVX-512 must not be what the linker picks for everybody: each variant's kernels are local symbols."""
    objects = [p for p in (ROOT / "build").rglob("*_cpu.o") if p.parts[-4:-3] != ("cmake",) and "temp" in str(p)]
    if not objects:  # installed from elsewhere; the build under test has none here
        pytest.fail("no build/temp.*/ objects: build with `make test`")
    for path in objects:
        weak = [
            line.split()[-1]
            for line in subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
            if re.match(r"^[0-9a-f]+ [WV] ", line) and "fusegrad" in line
        ]
        assert not weak, f"{path}: {weak[:3]}"


def test_every_row_of_the_contract_has_a_test():
    """Of those that docs/mission.md names each exists, the first is named after its row, and no test is named after a row that is none."""
    rows = dict(re.findall(r"^\| ([A-G]\d+) \|.*?\| (`test_.*) \|$", (ROOT / "docs" / "mission.md").read_text(), re.M))
    letters = dict(A=10, B=6, C=3, D=3, E=4, F=2, G=6)
    assert rows.keys() == {f"{letter}{i + 1}" for letter, n in letters.items() for i in range(n)}
    for row, cell in rows.items():
        tests = re.findall(r"`(\w+\.py)::(\w+)`", cell)
        assert tests[0][1].startswith(f"test_{row.lower()}_"), row
        for file, test in tests:
            assert re.search(rf"^(def {test}\(|{test} = holds\()", (ROOT / "tests" / file).read_text(), re.M), f"{row}: {file}::{test}"
    for path in (ROOT / "tests").glob("test_row_*.py"):
        named = re.findall(r"^def test_([a-g]\d+)_", path.read_text(), re.M)
        assert {row.upper() for row in named} <= rows.keys(), path.name


def test_the_project_speaks_only_of_itself():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml") and path.exists():
            assert not re.search("/(work|root|tmp|home)/", path.read_text()), name
