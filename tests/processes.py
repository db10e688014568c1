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


def _process(rank, world, folder, checks):
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT)
    made = {}
    try:
        for check in checks:
            torch.manual_seed(0)
            made[check.__name__] = ""
            check(rank, world)
    except BaseException:
        made[check.__name__] = f"rank {rank}\n{traceback.format_exc()}"  # and none after it: the others wait for this process
    (folder / f"{rank}.json").write_text(json.dumps(made))
    dist.destroy_process_group()


def make(checks, folder, world=2) -> dict[str, str]:
    """What each check says: nothing, if it is right in every process."""
    device = DEVICE if torch.cuda.device_count() >= world else "cpu"  # two of nccl's do not share a GPU
    with mock.patch.dict(os.environ, FUSEGRAD_TEST_DEVICE=device):
        mp.spawn(_process, args=(world, folder, checks), nprocs=world)
    made = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return {c.__name__: "\n".join(filter(None, (m.get(c.__name__, "not made: one before it failed") for m in made))) for c in checks}
