"""Times, bytes and memory of one call, and the copy speed beside them."""

import contextlib
import copy
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import timeit
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch._functorch.config as functorch_config
from report import PHASES

import fusegrad
from fusegrad import _C
from fusegrad._op import Sample
from fusegrad._samples import Make
from fusegrad.testing.budget import budget_breach, laid_out, reference

ROTATION = 3  # times the last-level cache: of half as much again enough stayed in it to make a copy up to three times as fast
MOST_SETS = 64  # of inputs: a call of which so many fit into a cache is timed in it, or for what it costs the host


def last_level_cache(device, threads) -> int:
    """Bytes; on a CPU of all that so many threads may have: some have one for a few cores each."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    found = {}  # {level: {the cores that share it: bytes}}
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, cores, size = ((path / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        found.setdefault(int(level), {})[cores] = int(size[:-1]) * {"K": 1024, "M": 2**20}[size[-1]]
    return sum(sorted(found[max(found)].values())[-threads:]) if found else 32 * 2**20


def machine(args, peers=None) -> dict:
    """What a reader must know to place the figures; `peers` has the versions of those that are there."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    # "-dirty" where the working tree is not what was committed; a tag would stand in front of the hash.
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return dict(
        date=str(date.today()),
        kind=args.device,
        device=torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        cores=os.cpu_count(),
        memory_GB=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        capability=_C.cpu_capability(),
        threads=args.threads,
        last_level_cache_MB=last_level_cache(args.device, args.threads) / 2**20,
        python=platform.python_version(),
        torch=torch.__version__,
        fusegrad=fusegrad.__version__,
        commit=commit,
        seed=args.seed,
        rounds=args.rounds,
        sides=list(args.sides),
        peers=peers,
        recycled_memory=args.recycle,
    )


def code_is_that_of(commit) -> bool:
    """Whether all that figures depend on is as it was committed then."""
    root = Path(__file__).resolve().parent.parent
    changes = ("git", "diff", "--quiet", commit, "--", "csrc", "python", "setup.py", "bench/*.py", "examples/*.py")
    return bool(commit) and not subprocess.run(changes, capture_output=True, cwd=root).returncode


@dataclass
class Call:
    """One set of arguments: the leaves that gradients are taken of, by name, and the incoming gradients."""

    kwargs: dict
    leaves: dict
    cotangents: tuple = ()

    def tensors(self):
        return [v for v in self.kwargs.values() if isinstance(v, torch.Tensor)]

    def forward(self, f) -> tuple:
        y = f(**self.kwargs)
        return y if isinstance(y, tuple) else (y,)

    def both(self, f):
        return self.backward(self.forward(f))

    def backward(self, outputs, **options):
        return torch.autograd.grad(outputs, list(self.leaves.values()), self.cotangents, **options)


def prepare(op, dtype, rows, cols, device, seed, layout="contiguous") -> Call:
    kwargs = laid_out(Sample("bench", op.bench(Make(dtype, device=device, seed=seed), rows, cols)), layout).kwargs
    floating = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    call = Call(kwargs, {k: v.requires_grad_() for k, v in floating.items() if k not in op.constants})
    generator = torch.Generator().manual_seed(seed)
    call.cotangents = tuple(torch.randn(y.shape, generator=generator).to(y) for y in call.forward(op.functional))
    return call


def bytes_beside(tensors, others) -> int:
    """Of those that are none of the others, each once."""
    known = {t.data_ptr() for t in others}
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.data_ptr() not in known}.values())


def bytes_moved(op, call) -> dict:
    """What must be read and written once: forward the arguments and the results; backward the incoming gradients, the arguments, or
    what is kept of them where that is less, and the gradients. A result that is an argument itself moves nothing."""
    outputs, arguments = call.forward(op.functional), sum(t.nbytes for t in call.tensors())
    results = bytes_beside(outputs, call.tensors())
    forward = arguments + results if results else 0
    incoming = sum(t.nbytes for t in call.cotangents)
    backward = min(arguments, saved_bytes(op.functional, call)) + incoming + bytes_beside(call.backward(outputs), call.cotangents)
    return dict(forward=forward, backward=backward, both=forward + backward)


def saved_bytes(f, call) -> int:
    """Of what a backward keeps: what is saved for it, and what a Function holds in attributes of its context."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()  # and keeps none: a result would hold itself for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = call.forward(f)
    nodes = {y.grad_fn for y in outputs} - {None}
    queue = list(nodes)
    while queue:
        node = queue.pop()
        for v in getattr(node, "__dict__", {}).values():
            if isinstance(v, torch.Tensor):
                pack(v)
        queue += (fresh := {after for after, _ in node.next_functions} - nodes - {None})
        nodes |= fresh
    return sum(storages.values())


@contextlib.contextmanager
def silent_stderr():
    """The profiler announces itself there."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def peak_bytes(f, call, device) -> int:
    """The most memory that one forward and backward holds beyond its arguments."""
    call.both(f)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.both(f)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call.both(f)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def wrong(op, name, f, call, exact=None) -> str | None:
    """Why a side's result on these inputs is not to be trusted: ours by the error budget, another's if its distance from
    the float64 reference is more than 100 eps (4 eps in 16 bits), since it may round in between, of the reference's norm, or of
    what must have cancelled in it for the same reference in float32 to be off as it is. Both references are kept in `exact`, a
    dict, for the next side."""
    torch.manual_seed(17)  # as the table's calls do
    outputs, keys = call.forward(f), list(call.leaves)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient of {k}": g for k, g in zip(keys, call.backward(outputs))}
    if op.random and name != "fusegrad":  # it draws otherwise, and there is nothing to compare it with
        return None
    sample = Sample("bench", {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in call.kwargs.items()})
    if name == "fusegrad":
        return budget_breach(op, sample, found, call.cotangents, keys)
    dtype = call.cotangents[0].dtype
    limit = (4 if dtype.itemsize == 2 else 100) * torch.finfo(dtype).eps
    exact = {} if exact is None else exact
    if not exact:
        narrow = reference(op, sample, torch.float32, call.cotangents, keys)
        for k, r in reference(op, sample, torch.float64, call.cotangents, keys).items():
            exact[k] = r, max(r.norm(), (narrow[k].double() - r).norm() / torch.finfo(torch.float32).eps)
    for k, (r, size) in exact.items():
        error = (found[k].double() - r).norm()
        if not error <= limit * size:
            return f"{k}: relative error {error / r.norm():.1e}"
    return None


def spread(times) -> dict:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return dict(median=statistics.median(times), low=low, high=high)


def by_rounds(own, others) -> dict:
    """fusegrad's time over another side's, turn by turn: what disturbs the machine for longer than a turn is in both. The median, and
    the range, which quartiles of a few turns are too narrow for: half of all turns are outside of them."""
    found = [a / b for a, b in zip(own, others)]
    return dict(median=statistics.median(found), low=min(found), high=max(found))


class Clock:
    """Seconds of one call of a function of no arguments: n calls at a time, on the clock of the device.

    Each turn begins with a call that is not timed: a side's results shall lie where its own last ones did, as in a training loop, and not
    in memory that the side before it has just freed and has in the caches. A call so long that no cache can matter to it goes without.
    A turn is long enough for them to get there: in turns of 2 ms between other sides, backward of mse_loss (float32, 65536 x 64) took
    3.2 ms where alone it takes 2.2, and 2.4 in turns of 20 ms; sides that share torch's memory lost nothing by it.
    The timer is the one beneath `torch.utils.benchmark.Timer`, which itself makes more such calls."""

    LONG = 0.2  # seconds
    ENOUGH = 10.0  # seconds of calls, after which a side takes no more turns of a phase

    def __init__(self, step, device, least=2e-2):
        self.step, self.device = step, device
        self.timer, self.long = timeit.Timer(step), False
        once = self.seconds(1)
        self.long = once > self.LONG
        once = once if self.long else min(once, self.seconds(1), self.seconds(1))  # one alone may have been disturbed
        self.n = min(10_000, math.ceil(least / max(once, 1e-7)))

    def seconds(self, n=None):
        n = n or self.n
        if not self.long:
            self.step()
        if self.device != "cuda":
            return self.timer.timeit(n) / n
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(n):
            self.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / n


def steps_of(f, calls, phase, graphs=MOST_SETS):
    """A function of no arguments that does the phase on the next set of arguments, of which backward takes the first ones."""
    calls = calls[:graphs] if phase == "backward" else calls
    turn = itertools.cycle(range(len(calls)))
    if phase == "backward":
        graphs = [call.forward(f) for call in calls]
        return lambda: calls[i := next(turn)].backward(graphs[i], retain_graph=True)
    return lambda: getattr(calls[next(turn)], phase)(f)


def sets_of(size, cache) -> int:
    """How many sets of so many bytes are that much more than the cache holds."""
    return max(1, min(math.ceil(ROTATION * cache / max(1, size)), MOST_SETS))


def compile_anew():
    if "torch._dynamo" in sys.modules:  # which takes seconds to import, and without a compiled side never is
        torch._dynamo.reset()


@contextlib.contextmanager
def kept_graphs():
    """Within, torch.compile is for graphs whose backward runs more than once. Before and after it lets a backward write into what the
    forward has kept, as it does for users."""
    compile_anew()
    with functorch_config.patch(donated_buffer=False):
        yield
    compile_anew()


def copying(nbytes, device, cache):
    """A function that moves that many bytes by a copy, through more memory than the cache as far as the calls do."""
    sets = sets_of(nbytes, cache)
    pairs = [torch.zeros(2, max(1, nbytes // 2), dtype=torch.uint8, device=device) for _ in range(sets)]
    turn = itertools.cycle(pairs)

    def step():
        pair = next(turn)
        pair[1].copy_(pair[0])

    return step


def measure(op, dtype, rows, cols, layout, sides, args) -> dict:
    """One cell: every side in turn, on the same inputs."""
    first = prepare(op, dtype, rows, cols, args.device, args.seed, layout)
    size, cache = sum(t.nbytes for t in first.tensors()), last_level_cache(args.device, args.threads)
    sets, moved = sets_of(size, cache), bytes_moved(op, first)
    calls = [first, *(copy.deepcopy(first) for _ in range(1, sets))]
    cell = dict(op=op.name, dtype=str(dtype).removeprefix("torch."), rows=rows, cols=cols, layout=layout, gemm=bool(op.gemm))
    cell |= dict(bytes=moved, rotated_bytes=sets * size, sides={name: {} for name in sides})

    def of_those_that_work(f, *more, first=0):
        """{side: f(side, *more)}; one that raises (a peer without a backward, a missing compiler) is not measured, and the others are."""
        found, (*names,) = {}, cell["sides"]
        for name in names[first:] + names[:first]:
            if "wrong" not in cell["sides"][name]:
                try:
                    found[name] = f(name, *more)
                except Exception as error:
                    cell["sides"][name] = dict(wrong=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return found

    exact, order = {}, list(sides)

    def trial(name):
        f = sides[name]
        reason = wrong(op, name, f, first, exact)
        return dict(wrong=reason) if reason else dict(saved=saved_bytes(f, first), peak=peak_bytes(f, first, args.device))

    compile_anew()
    cell["sides"] |= of_those_that_work(trial)
    exact.clear()

    def clock(name, phase):
        at = order.index(name) * sets // len(order)  # no side finds in the caches what the one before it has read
        graphs = sets_of(max(size, cell["sides"][name]["saved"]), cache)  # some keep more than their arguments
        return Clock(steps_of(sides[name], calls[at:] + calls[:at], phase, graphs), args.device)

    def turn(name, clocks, times):
        if sum(times[name]) < Clock.ENOUGH:
            times[name].append(clocks[name].seconds())

    for phase in PHASES:
        with kept_graphs() if phase == "backward" else contextlib.nullcontext():
            clocks = of_those_that_work(clock, phase)
            copy_clock, copies = Clock(copying(moved[phase], args.device, cache), args.device), []
            times = {name: [] for name in clocks}
            for i in range(args.rounds):  # of which each begins with another side
                of_those_that_work(turn, clocks, times, first=i % len(sides))
                copies.append(copy_clock.seconds())
            del clocks
        cell.setdefault("copy", {})[phase] = copied = spread(copies)
        for name in of_those_that_work(times.get):
            cell["sides"][name][phase] = s = spread(times[name])
            s["GB_s"] = moved[phase] / s["median"] / 1e9
            s["percent_of_copy"] = 100 * copied["median"] / s["median"]
            if phase == "both" and name != "fusegrad" and "fusegrad" in times:
                s["ratio"] = by_rounds(times["fusegrad"], times[name])
    return cell
