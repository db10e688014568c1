"""The code in the README and the docs runs, and prints what it is said to print; commands, paths and quotes are those of the checkout."""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fusegrad
import fusegrad.functional as F
from fusegrad._op import Op, wide
from fusegrad.ops import gated
from fusegrad.testing import check
from table import F64

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# add_an_op.md quotes pieces of an op's files, see below; export.md needs what not every machine has.
NOT_RUN = ("add_an_op.md", *(() if importlib.util.find_spec("onnxruntime") else ("export.md",)))
LANGUAGES = {"python", "output", "sh", "text", "cpp", "{toctree}", "{eval-rst}"}
FENCE = r"^```(\S*)\n(.*?)^```$"


def blocks(page, *languages):
    return [(language, code) for language, code in re.findall(FENCE, page.read_text(), re.M | re.S) if language in languages]


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
RUN = [
    pytest.param(page, id=page.name, marks=[pytest.mark.rotating(0)] if page.name == "compile.md" else [])  # a compiler's work
    for page in PAGES
    if page.name not in NOT_RUN and blocks(page, "python")
]


@pytest.mark.parametrize("page", RUN)
def test_code(page):
    """The blocks of a page, one after the other, as a reader would type them; `output` is what the block before it printed."""
    parts, expected = [], {}
    for language, code in blocks(page, "python", "output"):
        if language == "python":
            parts.append(code)
        else:
            expected[len(parts) - 1] = code
    done = subprocess.run([sys.executable, "-c", "\nprint(end='\\f')\n".join(parts)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("\f")
    for i, text in expected.items():
        assert [line.rstrip() for line in printed[i].splitlines()] == text.splitlines()


@pytest.mark.parametrize("function", (fusegrad.fuse, fusegrad.unfuse, check), ids=lambda f: f.__name__)
def test_examples_of_docstrings(function):
    """Those of the ops, "Equivalent eager code", are run by test_structure.py, on the ops' samples."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    if function is fusegrad.unfuse:
        fusegrad.fuse(model)
    op = SimpleNamespace(apply=lambda x, b: F.bias_act(x, b, "silu"))
    scope = dict(MyOp=op, my_reference=lambda x, b: torch.nn.functional.silu(wide(x) + wide(b)).to(x.dtype))
    few = functools.partial(check, only=["values_and_gradients", "gradcheck"])
    scope |= dict(fusegrad=fusegrad, torch=torch, check=few, model=model)
    exec(textwrap.dedent(re.split(r"Example::\n", inspect.getdoc(function))[1].strip("\n").split("\n\n")[0]), scope)
    if function is check:
        scope["test_my_op"]()


@each_page
def test_every_block_is_of_a_known_kind(page):
    """So that no code goes by unseen: not without a language, and not by its indentation."""
    text = page.read_text()
    assert {language for language, _ in re.findall(FENCE, text, re.M | re.S)} <= LANGUAGES
    assert text.count("```") == 2 * len(re.findall(FENCE, text, re.M | re.S))
    prose = re.sub(FENCE, "", text, flags=re.M | re.S)
    assert not re.search(r"^\n {4,}\S", prose, re.M)


def options(words):
    return {word.split("=")[0] for word in words if word.startswith("-")}


def check_command(words):
    """That the files, targets and options which a command names are there."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name = words.pop(0).split("=")[0]
        assert any(name in path.read_text() for path in (ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp"))), name
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in rest:
            name = word.split("=")[0]
            assert f"$({name})" in makefile if "=" in word else name in re.search(r"\.PHONY: (.*)", makefile).group(1).split(), word
    elif program in ("python", "torchrun") and (scripts := [word for word in rest if word.endswith(".py")]):
        place = rest.index(scripts[0])
        script = (ROOT / scripts[0]).read_text()
        for option in options(rest[place + 1 :]):
            assert f'"{option}"' in script, option
        if program == "torchrun":
            from torch.distributed.run import get_args_parser

            known = {name for action in get_args_parser()._actions for name in action.option_strings}
            assert options(rest[:place]) <= known
    elif program == "python" and rest[:2] == ["-m", "fusegrad"]:
        assert f'"{rest[2]}"' in (ROOT / "python/fusegrad/__main__.py").read_text()
    elif program == "pip" and rest[0] == "install":
        assert options(rest) <= {"--no-build-isolation"}
        for word in rest[1:]:
            assert word in (".", "wheel", "ninja") or word.startswith("-") or word in (ROOT / "Makefile").read_text(), word
    else:
        raise AssertionError(f"unknown command: {program}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.name)
def test_commands(page):
    for _, code in blocks(page, "sh"):
        for line in code.splitlines():
            if words := shlex.split(line, comments=True):
                check_command(words)


@each_page
def test_files_that_are_named_exist(page):
    for span in re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", page.read_text(), flags=re.M | re.S)):
        for path in re.findall(r"(?<![\w/<])((?:\w[\w.-]*/)+[\w.-]+\.(?:py|h|cpp|cu|md|json))\b", span):
            assert any((place / path).exists() for place in (ROOT, DOCS, ROOT / "csrc")), path


def test_the_walk_through_an_op_quotes_it():
    """C++ line by line; Python by what it does: the reference computes the op, the row has the fields of `Op`."""
    page = DOCS / "add_an_op.md"
    family = "\n".join(path.read_text() for path in (ROOT / "csrc" / "ops").glob("gated*"))
    lines = {line.strip() for line in family.splitlines()}
    for line in "".join(code for _, code in blocks(page, "cpp")).splitlines():
        assert line.strip() in lines | {""}, line

    reference, row = [code for _, code in blocks(page, "python")]
    scope = dict(torch=torch, Tensor=Tensor, wide=wide)
    exec(reference, scope)
    packed = torch.randn(3, 8, dtype=F64)
    torch.testing.assert_close(scope["swiglu_reference"](packed, None, -1, 0), gated.swiglu_reference(packed, None, -1, 0))
    call = ast.parse(row).body[0].value
    assert {keyword.arg for keyword in call.keywords} <= {field.name for field in dataclasses.fields(Op)}
    assert all(hasattr(gated, k.value.id) for k in call.keywords if isinstance(k.value, ast.Name))
