"""The site: `make docs` builds it from these pages, which are plain Markdown, and from the docstrings. Nothing of it needs a network."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import fusegrad

project, version = "fusegrad", fusegrad.__version__
html_title = f"fusegrad {version}"
html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_show_copyright = html_copy_source = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
nitpicky = True
default_role = "code"  # docstrings put code in single backticks
napoleon_custom_sections = ["Returns", "Raises"]  # prose, not lists of types
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "functional"}
autodoc_inherit_docstrings = False  # those of torch.nn
autodoc_typehints = "none"
add_module_names = False
html_math_renderer = "mathml"


def _mathml(translator, node, as_block):
    try:
        translator.body.append(tex2mathml(node.astext(), as_block=as_block))
    except MathError as error:
        logging.getLogger(__name__).warning("formula %s: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def _link(app, what, name, obj, options, lines):
    """From a module to the functions that it names, and from a function to another that it says to see."""
    code = r"`(\w+)`" if name.startswith("fusegrad.nn.") else r"(?<=[Ss]ee )`(\w+)`"
    known = set(fusegrad.functional.__all__)
    lines[:] = [re.sub(code, lambda m: f":py:func:`~fusegrad.functional.{m[1]}`" if m[1] in known else m[0], line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _link)
    # As MathML, which browsers show by themselves.
    renderers = ((lambda self, node, block=block: _mathml(self, node, block), None) for block in (False, True))
    app.add_html_math_renderer("mathml", *renderers)
