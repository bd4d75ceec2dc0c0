"""Builds the site from `docs/` with Sphinx: see decision 11. `make docs` fails on every warning."""

import re

from sphinx.application import Sphinx

import cascade

project = "Cascade"
author = "the Cascade authors"
copyright = "the Cascade authors, Apache-2.0"
version = release = cascade.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
nitpicky = True
# Types of other packages: their inventories of names would have to be downloaded.
ARRAYS = ("Array", "Bool", "Float32", "Float64", "Int64")
nitpick_ignore_regex = [
    ("py:.*", "|".join(ARRAYS)),
    # docs/cascade.example.toml documents the settings
    ("py:.*", r"cascade\.config\..*"),
    ("py:.*", r"(collections|concurrent|datetime|enum|numpy|pathlib|types|typing|np)\..*"),
]

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4

# The docstrings are plain text with `names` in single back-ticks.
default_role = "code"
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ARRAYS}
autodoc_default_options = {"members": True, "undoc-members": True}
python_use_unqualified_type_names = True
add_module_names = False
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "Cascade"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5c7a", "color-brand-content": "#0b5c7a"},
    "dark_css_variables": {"color-brand-primary": "#6ec3e0", "color-brand-content": "#6ec3e0"},
}


def _signature(
    app: object, kind: str, name: str, value: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Names of arrays as the code has them; none for a protocol, as it is not called."""
    texts = [re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text or "") or None for text in (signature, returned)]
    protocol = kind == "class" and getattr(value, "_is_protocol", False)
    return "" if protocol else texts[0], texts[1]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _signature)
