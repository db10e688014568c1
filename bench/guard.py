"""That the CPU kernels still compute in vectors: a look at their object code, which needs no clock.

    python bench/guard.py [VARIANT ...]        avx2, avx512 (default: both, and without the latter where FUSEGRAD_AVX512 is 0)

For every op and dtype of the CPU sources there must be inner loops that compute on the variant's widest registers and on nothing
else, more than compute on single numbers alone (tails and sums over a vector do), and in none may the single numbers outnumber the
vectors: a driver that a compiler stops vectorising, or whose inner loop falls back to scalars, fails here before anybody measures it.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ["avx2"] + ["avx512"] * (os.environ.get("FUSEGRAD_AVX512", "1") != "0")
REGISTERS = {"avx2": "ymm", "avx512": "zmm", "default": "zmm"}
DTYPES = ("double", "float", "c10::Half", "c10::BFloat16")
ACTIVATIONS = re.findall(r"^  (\w+),$", (ROOT / "csrc/ops/activation.h").read_text(), re.M)  # as object files have them: by number
ARITHMETIC = re.compile(r"v?(add|sub|mul|fn?m(add|sub)\d*)(ps|pd|ss|sd)\b")
OF_INTEGERS = re.compile(r"vpmul")  # what random bits are made of; beside doubles, half as wide
MOVE = re.compile(r"v?mov[au]p[sd]\b")


def objects(variant):
    """Those of the newest build: one of another torch beside it could hide what is missing."""
    builds = [sorted(path.glob(f"{variant}/**/*_cpu.o")) for path in (ROOT / "build").glob("temp-*")]
    return max(builds, key=lambda paths: max((p.stat().st_mtime for p in paths), default=0), default=[])


def functions(path):
    """(demangled name, [(address, instruction, operands)]) of the object's code."""
    text = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n(?=[0-9a-f]+ <)", text)[1:]:
        head, _, body = part.partition("\n")
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", body, re.M)
        yield head, [(int(at, 16), what, operands) for at, what, operands in lines]


def loops(code):
    """The innermost loops: what lies between a jump backwards and where it goes, if no other such jump is in between."""
    spans = []
    for at, what, operands in code:
        target = re.match(r"([0-9a-f]+) <", operands) if what.startswith("j") else None
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    for first, last in spans:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            yield [line for line in code if first <= line[0] <= last]


def always_leaves(loop):
    """Whether it is none: the way back of a rare case that was moved to the end, and what lies before that."""
    targets = [m[1] for _, what, operands in loop if what == "jmp" and (m := re.match(r"([0-9a-f]+) <", operands))]
    return any(not loop[0][0] <= int(target, 16) <= loop[-1][0] for target in targets)


def finds_rows(loop):
    """Whether it looks for the places of rows, which takes divisions of integers: nothing that is done for each element."""
    return any(what.startswith("idiv") for _, what, _ in loop)


def arithmetic(loop, register):
    """How many instructions compute on the widest registers, and how many on one number."""
    found = [(m[3], operands) for _, what, operands in loop if (m := ARITHMETIC.match(what))]
    vectors = sum(register in o for kind, o in found if kind in ("ps", "pd"))
    vectors += sum(bool(OF_INTEGERS.match(what)) for _, what, _ in loop)
    return vectors, sum(kind in ("ss", "sd") for kind, _ in found)


def hands_on(loop, register):
    """Whether the loop passes the widest registers to a function, which may be all that it does."""
    return any(what.startswith("call") for _, what, _ in loop) and any(MOVE.match(what) and register in o for _, what, o in loop)


def examine(variant, paths):
    """(number of kernels, complaints)."""
    register, complaints, expected = REGISTERS[variant], [], set()
    wide, narrow, handed = defaultdict(int), defaultdict(int), defaultdict(int)
    for source in sorted((ROOT / "csrc/ops").glob("*_cpu.cpp")):
        drivers = re.findall(r"FUSEGRAD_(?:ROWS|ANY_ROWS|MAP)\((.+)\)|class (\w+Cpu)", source.read_text())
        for op in map("".join, drivers):  # or a driver of its own
            expected |= {(op, dtype) for dtype in DTYPES}
    for path in paths:
        for name, code in functions(path):
            found = re.search(r"(?:RowsCpu|AcrossCpu|MapCpu)<fusegrad::(\w+(?:<.*?>)?), ([\w:]+)|(\w+Cpu)<([\w:]+)", name)
            if not found:
                continue
            op, dtype = filter(None, found.groups())
            kernel = re.sub(r"\(fusegrad::Act\)(\d+)", lambda m: f"Act::{ACTIVATIONS[int(m[1])]}", op), dtype
            for loop in loops(code):
                vectors, scalars = arithmetic(loop, register)
                wide[kernel] += vectors > 0 and not scalars
                handed[kernel] += hands_on(loop, register)
                narrow[kernel] += scalars > 0 and not vectors and not finds_rows(loop)
                if 0 < vectors < scalars and not always_leaves(loop):
                    complaints.append(
                        f"{variant}: {kernel[0]}, {kernel[1]}: {scalars} scalar beside {vectors} vector instructions in a loop"
                    )
    complaints += [
        f"{variant}: {op}, {dtype}: {wide[op, dtype]} loops compute on {register}, {narrow[op, dtype]} on single numbers"
        for op, dtype in sorted(expected)
        if (wide[op, dtype] or handed[op, dtype]) <= narrow[op, dtype]
    ]
    return len(expected), complaints


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", choices=[[], *REGISTERS], metavar="VARIANT")
    variants = parser.parse_args().variants or BUILT
    if missing := [v for v in variants if not objects(v)]:
        sys.exit(f"guard.py: no objects of {', '.join(missing)} in build/: build first (make test does)")
    failed = False
    for variant in variants:
        kernels, complaints = examine(variant, objects(variant))
        failed |= bool(complaints)
        print(*complaints, f"{variant}: {kernels} kernels, {len(complaints)} complaints", sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
