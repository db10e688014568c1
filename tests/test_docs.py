"""The code in the README and the docs runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# add_an_op.md quotes pieces of an op's file, mission.md has no code; export.md needs what not every machine has.
NOT_RUN = ("add_an_op.md", "mission.md", *(() if importlib.util.find_spec("onnxruntime") else ("export.md",)))
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in NOT_RUN)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code(page):
    """The blocks of a page, one after the other, as a reader would type them."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))
    assert code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
