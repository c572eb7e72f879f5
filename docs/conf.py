"""Sphinx: `make docs` writes the site."""

project = "nemo_skymoe"
author = "the nemo_skymoe authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings quote code with one backtick, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False

# Every name of this package that the reference mentions has to be in the reference. Names of other packages have no page here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!nemo_skymoe).*")]

html_theme = "furo"
html_title = "nemo_skymoe"


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _without_type, priority=400)  # before napoleon, which has 500


def _without_type(app, what, name, documented, options, lines):
    """Keep napoleon from taking the words before a colon for the type of an attribute."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"
