"""Every .cu file through nvcc: no warning, no spilled register, no missing kernel, rows moved 16 bytes at a time. Needs no GPU.

FUSEGRAD_NVCC_ARCHS: compute capabilities, separated by spaces (default: 90). `make nvcc` compiles for all that are supported."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/ops").glob("*_cuda.cu"))
ARCHS = os.environ.get("FUSEGRAD_NVCC_ARCHS", "90").split()
PAIRS = [("double", "double"), ("float", "float"), ("Half", "Half"), ("Half", "float"), ("BFloat16", "BFloat16"), ("BFloat16", "float")]

pytestmark = pytest.mark.slow


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def kernels(ptx, said):
    """{(program, op, dtypes..., in packs): (PTX, registers, spilled bytes)}"""
    code = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.S))
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", said, re.S
    )
    found = {}
    for mangled, stores, loads, registers in report:
        name = re.sub(r"\(anonymous namespace\)::|fusegrad::|c10::|_GLOBAL__N__\w+::", "", run("c++filt", mangled))
        program, arguments = re.search(r"kernel<(\w+)<(.*?)> *>", name).groups()
        found[(program, *re.split(r", *", arguments))] = code.pop(mangled), int(registers), int(stores) + int(loads)
    assert not code
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc(source, arch, tmp_path):
    ptx, include = tmp_path / "kernels.ptx", [f"-isystem={path}" for path in include_paths()]
    start = time.perf_counter()
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
    run("nvcc", *flags, "-ptx", f"-arch=compute_{arch}", *include, source, "-o", ptx)
    said = run("ptxas", f"-arch=sm_{arch}", "-O3", "-v", "--warning-as-error", ptx, "-o", tmp_path / "kernels.cubin")
    seconds = time.perf_counter() - start
    found = kernels(ptx.read_text(), said)

    spilled = {key: spills for key, (_, _, spills) in found.items() if spills}
    assert not spilled
    most = max(registers for _, registers, _ in found.values())
    print(f"{source.name} for sm_{arch}: {len(found)} kernels, at most {most} registers, 0 spilled bytes, {seconds:.1f} s")

    header = source.with_name(source.name.replace("_cuda.cu", ".h")).read_text()
    listed = re.findall(r"FUSEGRAD_(ROWS|ANY_ROWS|MAP)\((\w+)(?:<.*>)?\)", source.read_text())
    for kind, op in dict.fromkeys(listed):  # of a template, all that is listed of it
        base, sizes = re.search(rf"struct {op} : (\w+).*?static constexpr int (.*?);", header, re.S).groups()
        sizes += (re.search(rf"struct {base} : .*?static constexpr int (.*?);", header, re.S) or ["", ""])[1]
        sizes = {k: int(v) for k, v in re.findall(r"(\w+) = (\d+)", sizes)}
        for driver in {"ROWS": ["RowsCuda"], "ANY_ROWS": ["RowsCuda", "AcrossCuda"], "MAP": ["MapCuda"]}[kind]:
            own = {key[1:]: text for key, (text, _, _) in found.items() if key[0] == driver and key[1].partition("<")[0] == op}
            pairs = PAIRS if sizes.get("params") else [(t, t) for t in dict(PAIRS)]
            expected = {(*(pair[:1] if kind == "MAP" else pair), packed) for pair in pairs for packed in ("true", "false")}
            names = {key[0] for key in own}
            assert len(names) == listed.count((kind, op)) and own.keys() == {(name, *key) for name in names for key in expected}
            for key, text in own.items():
                if key[-1] == "true":  # as four times 32 bits or two times 64
                    assert not sizes.get("in") or re.search(r"ld\.global\.nc\.v(4\.\w32|2\.\w64)", text), (driver, op, key)
                    assert not sizes.get("out") or re.search(r"st\.global\.v(4\.\w32|2\.\w64)", text), (driver, op, key)
