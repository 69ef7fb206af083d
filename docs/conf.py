"""The documentation site: `make docs` builds it into docs/_build, with warnings as errors."""

import importlib.metadata

project = "privdistill"
release = version = importlib.metadata.version("privdistill")

extensions = [
    "myst_nb",  # brings myst_parser
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "jupyter_execute"]

# The pages are read on a code host too, so that only what degrades well there is switched on.
myst_enable_extensions = ["colon_fence"]
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
html_title = "privdistill"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
