from __future__ import annotations

import os
from datetime import date

from sphinx.ext.napoleon.docstring import NumpyDocstring

import scbin

project = "scbin"
author = "The scbin developers"
copyright = f"{date.today():%Y}, {author}"
version = release = scbin.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "generated/.ipynb_checkpoints", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
default_role = "literal"
nitpicky = True

# types of other packages; linked where their inventories can be fetched, plain text elsewhere
external = "anndata|dask|matplotlib|numpy|pandas|pd|scanpy|scipy|sklearn|torch|transformers"
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
nitpick_ignore_regex = [
    ("py:.*", rf"({external}|collections|pathlib|typing|os)\..*"),
    ("py:exc", r"Scbin\w+"),
    ("py:class", r"scbin\.tl\._\w+\.\w+"),  # described where they are taken or returned
    ("py:.*", "(None|Any|Ellipsis|bool|dict|float|int|list|str|tuple|Path|Literal)"),
]

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
always_use_bars_union = True
typehints_defaults = "braces"
typehints_use_rtype = False  # one heading, Returns
napoleon_google_docstring = False


# without types in docstrings, what stands under Returns is text, not a list of types
def returns(self: NumpyDocstring, section: str) -> list[str]:
    lines = self._dedent(self._consume_to_next_section())
    return [*self._format_block(":returns: ", lines[lines[0] == ":" :]), ""]  # the colon is sphinx_autodoc_typehints'


NumpyDocstring._parse_returns_section = returns
# nor is what stands before the first colon of a property its type
NumpyDocstring._parse_attribute_docstring = lambda self: self._consume_to_end()

nb_execution_mode = "off"  # notebooks are kept with their outputs
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = "scbin"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "show_toc_level": 2,
    "path_to_docs": "docs",
    "navbar_persistent": [],  # the search field is in the sidebar
}
