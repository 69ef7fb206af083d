"""The documentation site: `make docs` builds it into docs/_build, with warnings as errors."""

import importlib.metadata
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "privdistill"
release = version = importlib.metadata.version("privdistill")

extensions = [
    "myst_nb",  # brings myst_parser
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute"]

# The pages are read on a code host too, so that only what degrades well there is switched on.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Notebooks hold their outputs; `make notebooks` runs them anew.
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
# A single backquote is code, in docstrings as in Markdown.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Weight", "Source"]

html_theme = "furo"
html_title = f"privdistill {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def visit_math(translator, node):
    """Write a formula as MathML, which browsers show without a script or the network."""
    block = node.tagname == "math_block"
    tag = "div" if block else "span"
    translator.body.append(translator.starttag(node, tag, "", CLASS="math"))
    translator.body.append(f"{tex2mathml(node.astext(), as_block=block)}</{tag}>")
    raise nodes.SkipNode


def link_sources(*event):
    """Link the papers that a docstring cites."""
    lines = event[-1]
    link = r"`arXiv:\1 <https://arxiv.org/abs/\1>`__"
    lines[:] = [re.sub(r"arXiv:(\d{4}\.\d{5})", link, line) for line in lines]


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("autodoc-process-docstring", link_sources)
