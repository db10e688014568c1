"""The docs as a site: it is built without a warning and without a network, and has every public name."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["fusegrad", *(f"fusegrad.{page.stem}" for page in (ROOT / "docs" / "api").glob("*.md") if page.stem != "fusegrad")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """As `make docs` builds it: a link to a page or heading that is not there is a warning, and a warning is an error."""
    made = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(made)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return made


def test_every_public_name_is_in_the_reference(site):
    with open(site / "objects.inv", "rb") as file:
        found = InventoryFile.load(file, "", lambda base, page: page)
    for module in MODULES:
        public = importlib.import_module(module).__all__
        documented = {name for kind, names in found.items() if kind.startswith("py:") for name in names}
        missing = [name for name in public if f"{module}.{name}" not in documented]
        assert public and not missing, module


def test_every_public_module_has_a_page():
    """One that says what of it is public, and is not part of another's name."""
    package = ROOT / "python" / "fusegrad"
    public = [path for path in (*package.glob("[a-z]*.py"), *package.glob("[a-z]*/__init__.py"))]
    for path in public:
        names = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
        if names:
            name = path.parent.name if path.stem == "__init__" else path.stem
            assert f"fusegrad.{name}" in MODULES, name


def test_nothing_is_fetched(site):
    """Scripts, styles and formulas are files of the site or in the page: it is read without a network."""
    for page in site.rglob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"(https?:)?//", page.read_text()), page
    assert "<math" in (site / "api" / "functional.html").read_text()
