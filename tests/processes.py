"""Checks that several processes make together. A pair of them is started once a module and makes all of its checks."""

import datetime
import json
import os
import traceback
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from table import DEVICE

TIMEOUT = datetime.timedelta(seconds=120)
SEEN: list[float] = []  # how far what was noted is from what it must be


def note(found, expected):
    """The largest difference, over the largest value of what is right."""
    largest = expected.double().abs().amax().item() if expected.numel() else 0.0
    if 0 < largest < float("inf"):
        SEEN.append((found.double() - expected.double()).abs().amax().item() / largest)


def report(name, count, largest):
    """With `pytest -s`; docs/distributed.md has them."""
    if count:
        print(f"\n{name}: {count} tensors, largest relative difference {largest:.1e}", end="")


def _process(rank, world, folder, checks):
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT)
    made, figures = {}, {}
    try:
        for check in checks:
            torch.manual_seed(0)
            SEEN.clear()
            made[check.__name__] = ""
            check(rank, world)
            figures[check.__name__] = len(SEEN), max(SEEN, default=0.0)
    except BaseException:
        made[check.__name__] = f"rank {rank}\n{traceback.format_exc()}"  # and none after it: the others wait for this process
    (folder / f"{rank}.json").write_text(json.dumps((made, figures)))
    dist.destroy_process_group()


def make(checks, folder, world=2) -> dict[str, str]:
    """What each check says: nothing, if it is right in every process."""
    device = DEVICE if torch.cuda.device_count() >= world else "cpu"  # two of nccl's do not share a GPU
    with mock.patch.dict(os.environ, FUSEGRAD_TEST_DEVICE=device):
        mp.spawn(_process, args=(world, folder, checks), nprocs=world)
    made, figures = zip(*(json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)))
    for name in figures[0]:
        report(name, *map(max, zip(*(f.get(name, (0, 0.0)) for f in figures))))
    return {c.__name__: "\n".join(filter(None, (m.get(c.__name__, "not made: one before it failed") for m in made))) for c in checks}
