"""What is timed: fusegrad, what torch has, and the peers that are installed."""

import importlib
import sys
from pathlib import Path

import torch
from eager import WRITTEN

import fusegrad

OWN = ("fusegrad", "eager", "native", "compile")
PEERS = sorted(p.stem for p in (Path(__file__).parent / "peers").glob("[a-z]*.py"))


def eager(op):
    """What users write; beside a function of torch's own, which they call instead, its formula, step by step."""

    def formula(**kwargs):
        with fusegrad.use_reference():
            return op.functional(**kwargs)

    return WRITTEN.get(op.name, formula)


def compiled(op):
    return torch.compile(op.torch or WRITTEN[op.name], dynamic=False)


def peers(device) -> tuple[dict, dict]:
    """The adapters that can be used on the device, and why the others cannot."""
    found, absent = {}, {}
    for name in PEERS:
        try:
            adapter = importlib.import_module(f"peers.{name}")
            functions = adapter.load()
        except Exception as error:  # an import raises anything where a driver or a compiler is missing
            absent[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        if device in adapter.DEVICES:
            found[name] = functions
        else:
            absent[name] = f"runs on {', '.join(adapter.DEVICES)} only"
    return found, absent


def versions(installed) -> dict:
    """Of the peers that are packages of their own; an adapter is called as its package."""
    return {name: getattr(sys.modules[name], "__version__", "unknown") for name in installed if name in sys.modules}


def sides_of(op, wanted, installed) -> dict:
    every = dict(fusegrad=lambda: op.functional, eager=lambda: eager(op), compile=lambda: compiled(op))
    if op.torch is not None:
        every["native"] = lambda: op.torch
    every |= {name: (lambda f=functions[op.name]: f) for name, functions in installed.items() if op.name in functions}
    return {name: every[name]() for name in (*OWN, *PEERS) if name in every and name in wanted}
