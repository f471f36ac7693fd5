"""Sphinx settings: MyST Markdown pages, no extensions of our own. Build with `make docs`."""

from importlib.metadata import version as _version

project = "simlab"
author = copyright = "The simlab developers"
release = version = _version("simlab")
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"page_width": "1080px", "description": "PDE sequences, data, surrogates"}
exclude_patterns = ["_build"]
