"""Train a small byte-level language model of fused layers in several processes, by one of three ways to share the work:

ddp     every process has the model and its part of each batch (DistributedDataParallel)
fsdp    the same, but a process keeps only its part of the parameters and of the optimizer's state (fully_shard)
tensor  every process has its part of each layer and of the vocabulary, and the whole batch (parallelize_module)

A step sees the same batch whatever the way and the number of processes, so the losses are the same but for rounding. Started as it is,
it runs two processes on this machine; with a GPU for each by nccl, else on the CPU by gloo. On many machines, unchanged:

    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/train_distributed.py --parallel fsdp
"""

import argparse
import os
import sys
import weakref
from pathlib import Path
from time import perf_counter, sleep

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import fusegrad.functional as F
from fusegrad import nn

BYTES = 256
COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("out", "down")  # how a block's layers are split


class Block(torch.nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.head_dim, hidden = dim // heads, 3 * dim
        self.norm, self.add_norm, self.rotary = nn.RMSNorm(dim), nn.AddRMSNorm(dim), nn.RotaryEmbedding(dim // heads)
        for name in ("q", "k", "v", "out"):
            self.add_module(name, nn.Linear(dim, dim, bias=False))
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((dim, hidden), (dim, hidden), (hidden, dim)))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = scaled_dot_product_attention(*self.rotary(q, k), v, is_causal=True)
        h, x = self.add_norm(self.out(h.transpose(1, 2).flatten(2)), x)
        return x + self.down(F.swiglu(self.gate(h), self.up(h)))


class Model(torch.nn.Module):
    def __init__(self, dim, heads, layers):
        super().__init__()
        self.embedding, self.norm = torch.nn.Embedding(BYTES, dim), nn.RMSNorm(dim)
        self.blocks = torch.nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, BYTES, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def share(model, parallel, mesh, device):
    """The model as this process has it, and the loss of its logits."""
    if parallel == "ddp":
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None), F.cross_entropy
    if parallel == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh), F.cross_entropy
    for block in model.blocks:
        plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
        parallelize_module(block, mesh, plan)
    parallelize_module(model, mesh, {"head": ColwiseParallel()})
    return model, lambda logits, target: F.vocab_parallel_cross_entropy(logits, target, mesh.get_group())


def text():
    """Of Python's own library, which is there wherever this runs."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)[:2_000_000]), dtype=torch.uint8)


def process(options):
    """What torchrun starts."""
    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    last = train(options, device)
    dist.barrier()  # nobody leaves while another still waits for it
    # A thread of gloo may hold what it has reduced for a while yet. Those of a group that parallelize_module has used outlive
    # destroy_process_group: one that lets go of a tensor while Python ends takes the process down.
    while not gpu and last() is not None:
        sleep(0.001)
    # The model is gone by now. Were a DistributedDataParallel the last to hold the group, its end could wait for ever: with Python's
    # lock, for a thread of gloo that needs it.
    dist.destroy_process_group()


def train(options, device):
    """Gives a weak reference to the last tensor reduced."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    mesh = init_device_mesh(device.type, (world,))
    model, loss_of = share(Model(options.dim, options.heads, options.layers).to(device), options.parallel, mesh, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    data, draw, start = text(), torch.Generator().manual_seed(0), perf_counter()
    mine = slice(None) if options.parallel == "tensor" else slice(rank, None, world)
    if rank == 0:
        print(f"{world} processes ({dist.get_backend()}, {device.type}), {options.parallel}", flush=True)
    for step in range(options.steps):
        at = torch.randint(len(data) - options.context - 1, (options.batch,), generator=draw)[mine]
        tokens = torch.stack([data[i : i + options.context + 1] for i in at]).to(device, torch.int64)
        loss = loss_of(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            total = loss.detach().clone()
            dist.all_reduce(total)
            if rank == 0:
                print(f"step {step}: loss {total.item() / world:.5f}, {perf_counter() - start:.1f} s", flush=True)
    return weakref.ref(total)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tensor"), default="ddp", help="default: ddp")
    defaults = dict(processes=2, steps=100, batch=16, context=128, dim=128, heads=4, layers=2)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = parser.parse_args()
    for name in defaults:
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected a positive number, got {getattr(options, name)}")
    options.processes = int(os.environ.get("WORLD_SIZE", options.processes))  # torchrun's number
    if options.dim % (2 * options.heads):
        parser.error(f"argument --dim: must be a multiple of 2 heads ({2 * options.heads}), got {options.dim}")
    shared = ("heads", "dim") if options.parallel == "tensor" else ("batch",)
    for name in shared:
        if getattr(options, name) % options.processes:
            parser.error(f"argument --{name}: must be a multiple of the {options.processes} processes, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    chosen = arguments()
    if "RANK" in os.environ:
        process(chosen)
    else:  # as torchrun does it
        from torch.distributed.run import main

        # The processes find each other by this address: the machine's own name, the default, need not resolve.
        main(["--standalone", "--local-addr=localhost", f"--nproc-per-node={chosen.processes}", __file__, *sys.argv[1:]])
