"""Sphinx configuration: `make docs` builds the pages in this folder, those made from the code among them."""

import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

project = "lightning_longrope"
version = release = installed("lightning-longrope")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# Every reference to a name or an option of this package must resolve; those to other packages are plain text.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!lightning_longrope).*"),
    ("py:.*", r"lightning_longrope\..*\.(T|Bins|Layout|Pieces|Stream|Stretches)"),  # private, and type variables
]

autodoc_inherit_docstrings = False  # the hooks of Lightning are described there
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False  # pages.py writes the pages
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "returns_style")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "lightning_longrope"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
smartquotes_action = "D"  # dashes; quotes are often code
html_static_path = ["_static"]
html_css_files = ["style.css"]


def hide_private_bases(app: Sphinx, name: str, cls: type, options: Any, bases: list[Any]) -> None:
    """Puts the bases of a private base in its place."""
    for base in [base for base in bases if getattr(base, "__name__", "").startswith("_")]:
        place = bases.index(base)
        bases[place : place + 1] = base.__bases__


def keep_colons(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Joins what napoleon has parted: it takes the words before a colon for the type of an attribute."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what in ("attribute", "data", "property") and types:
        lines.remove(types[0])
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def setup(app: Sphinx) -> None:
    """Writes the pages that are made from the code before Sphinx reads any."""
    from pages import write_pages

    app.connect("autodoc-process-docstring", keep_colons, priority=600)  # after napoleon
    app.connect("autodoc-process-bases", hide_private_bases)
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir)))
