"""Sphinx's configuration: `pip install -e '.[docs]' && sphinx-build -W --keep-going -b html docs docs/_build`."""

from importlib.metadata import version as installed_version

project = "wsgi-loop"
author = "The wsgi-loop developers"
copyright = author
version = release = installed_version("wsgi-loop")

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
# So that links to a heading work here as they do where the repository is read.
myst_heading_anchors = 3
myst_enable_extensions = ["tasklist"]
highlight_language = "none"

html_theme = "furo"
html_title = f"wsgi-loop {release}"
html_copy_source = False
html_show_sphinx = False
