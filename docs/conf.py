"""Sphinx builds the site from the pages in this folder and from the docstrings of the package: `make docs`.

Sphinx with the Book theme, because readers know it from other projects of the field. MyST lets
the same Markdown read well in the repository and on the site.
"""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "hbx_gpu"
release = version = runpy.run_path(str(ROOT / "hbx_gpu" / "_version.py"))["__version__"]
copyright = "the hbx_gpu maintainers"  # noqa: A001 - Sphinx's name for it

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = False

# Headings get the same anchors as on the pages of a Git host, so that links hold in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

html_theme = "sphinx_book_theme"
html_title = "hbx_gpu"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has a search field
}
html_show_sourcelink = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, in words that stand alone
autodoc_default_options = {"members": True}
# Packages that the documented modules import, where they are not installed.
_OPTIONAL = ("torch", "nvidia", "lightning", "scvi", "accelerate")
autodoc_mock_imports = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
