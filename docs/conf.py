"""Configuration of Sphinx; what can be had from the code is written first."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import structured  # noqa: E402  # found by the line above
from docs import _generate  # noqa: E402  # found by the line above

_generate.build()

project = "structured-singd"
author = "The structured-singd authors"
project_copyright = f"2026, {author}"
release = version = structured.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_generated/*.md", "examples/*", "auto_examples/*.ipynb"]
highlight_language = "none"
html_theme = "furo"
html_title = project
html_static_path = ["_static", "_generated/static"]
html_css_files = ["pages.css"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
mathjax_path = "tex-svg.js"  # in the built site: formulas need no network

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"__init__\.py",
    "download_all_examples": False,
    "show_memory": False,
    "capture_repr": (),  # what is printed alone, not what a last line returns
}
