"""Sphinx configuration: `make docs` builds the pages in this folder, those made from the code among them."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

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
    ("py:.*", r"lightning_longrope\..*\.(T|_\w+|Bins|Layout|Pieces|Stream|Stretches)"),  # private, and type variables
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


def setup(app: Sphinx) -> None:
    """Writes the pages that are made from the code before Sphinx reads any."""
    from pages import write_pages

    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir)))
