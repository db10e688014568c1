"""Everything for a machine with a GPU, with its own python3 and the CUDA build of torch in it: `make gpu`.

    python3 tests/gpu.py [PART ...]

Parts, in order, each within 8 minutes: build (in place), table (test_conformance.py and test_cuda.py on cuda), semantics and contract
(the other test files that know of a device: what each op means, and autocast, rows A to C, DistributedDataParallel over nccl where
there are two GPUs, extensions), memcheck and racecheck (a small run under compute-sanitizer, where it is installed), bench. What each
found goes to one file, bench/results/<date>-<device>.json, which a part that runs again replaces its share of. Needs torch, numpy,
ninja, setuptools, pytest, pytest-xdist, hypothesis, rich; fetches nothing.
"""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as XML
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = dict(
    table=("cuda", "conformance"),
    semantics=("dropout", "errors", "losses", "norms", "rotary", "softmax"),
    contract=("amp", "distributed", "extension", "row_a", "row_b", "row_c"),
)
PARTS = ("build", *TESTS, "memcheck", "racecheck", "bench")
LIMIT = 8 * 60  # seconds of a part
JOBS = str(min(16, os.cpu_count() or 1))


def run(*command, **environment):
    """(exit status, seconds, output); the output is shown as it comes."""
    paths = os.pathsep.join(filter(None, (str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))))
    start, lines = time.perf_counter(), []
    print("+", *command, flush=True)
    with subprocess.Popen(
        ["timeout", str(LIMIT), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, round(time.perf_counter() - start, 1), "".join(lines)


def build():
    major, minor = torch.cuda.get_device_capability()
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    status, seconds, _ = run(
        sys.executable, "setup.py", "build_ext", "--inplace", FUSEGRAD_CUDA="1", TORCH_CUDA_ARCH_LIST=arch, MAX_JOBS=JOBS
    )
    return dict(ok=status == 0, seconds=seconds, architectures=arch)


def tests(part):
    report = ROOT / "build" / f"gpu-{part}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    status, seconds, output = run(
        *(sys.executable, "-m", "pytest", "-q", "--all", "-n", "8", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"),
        *(f"tests/test_{name}.py" for name in TESTS[part]),
        FUSEGRAD_TEST_DEVICE="cuda",
    )
    if not report.exists():  # it was stopped at the limit
        return dict(ok=False, seconds=seconds, why="not seen to its end", output=output[-4000:])
    suite = XML.parse(report).getroot().find("testsuite")
    counts = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in suite if len(case) and case[0].tag != "skipped"]
    return dict(ok=status == 0, seconds=seconds, **counts, failed=failed)


def sanitizer(tool):
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(program):
        return dict(ok=None, why="compute-sanitizer is not installed")
    command = (program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--small-run")
    status, seconds, output = run(*command, FUSEGRAD_TEST_DEVICE="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1", FUSEGRAD_STRICT="1")
    summary = re.findall(r"=========\s+((?:ERROR|RACECHECK) SUMMARY.*)", output)
    return dict(ok=status == 0 and "calls ran" in output, seconds=seconds, summary=summary)


def small_run():
    """Every op, dtype pair and kind of team, forward and backward."""
    from fusegrad._op import OPS, Sample
    from table import PAIRS, Make, run

    calls = 0
    for op in OPS.values():
        for pair in PAIRS:
            for rows, cols in ((0, 5), (3, 7), (70, 33), (5, 256), (9, 1024), (2, 5000), (1, 40_000)):
                run(op, Sample("", op.bench(Make(*pair), rows, cols)))
                calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls ran")


def bench():
    path = ROOT / "build" / "gpu-bench.json"
    path.unlink(missing_ok=True)
    status, seconds, _ = run(sys.executable, "bench/run.py", "--device", "cuda", "--rounds", "3", "--json", path)
    return dict(ok=status == 0, seconds=seconds, **(json.loads(path.read_text()) if path.exists() else {}))  # what was measured in time


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--small-run", action="store_true", help="what runs under compute-sanitizer")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"PART must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit(f"gpu.py: needs a GPU and a CUDA build of torch in {sys.executable}; torch {torch.__version__} sees none")
    if args.small_run:
        return small_run()
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    path = ROOT / "bench" / "results" / f"{date.today()}-{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= dict(
        date=str(date.today()),
        device=properties.name,
        multiprocessors=properties.multi_processor_count,
        memory_GB=round(properties.total_memory / 1e9, 1),
        driver=driver.split("\n")[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=sys.version.split()[0],
        commit=commit,
    )
    run_part = dict(build=build, memcheck=lambda: sanitizer("memcheck"), racecheck=lambda: sanitizer("racecheck"), bench=bench)
    run_part |= {part: functools.partial(tests, part) for part in TESTS}
    for part in args.parts or PARTS:
        results[part] = run_part[part]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{path.relative_to(ROOT)}")
    done = [(part, results[part]) for part in PARTS if part in results]
    for part, result in done:
        print(f"  {part}: { {True: 'ok', False: 'FAILED', None: result.get('why')}[result['ok']] }, {result.get('seconds', 0)} s")
    sys.exit(any(result["ok"] is False for _, result in done))


if __name__ == "__main__":
    main()
