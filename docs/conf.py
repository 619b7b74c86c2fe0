"""Sphinx builds the site from the files that GitHub shows: the source folder is the root of the repository (`make docs`).

So a link that works there works here: to another guide, to a heading, or to a file of code, which the site offers for download.
"""

import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "ngpt-deploy"
author = "the ngpt-deploy authors"
project_copyright = "the ngpt-deploy authors, Apache-2.0"
release = version = re.search(r'^__version__ = "(.+)"', (ROOT / "ngpt" / "__init__.py").read_text("utf-8"), re.M)[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**.md"]
exclude_patterns = [".*", "build", "**/__pycache__", "*.egg-info", "tests", "deploy", "examples"]
nitpicky = False
default_role = "code"  # docstrings name things in single backticks

myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature and the text have them
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"ngpt-deploy {release}"
html_copy_source = False
html_show_sphinx = False
templates_path: list[str] = []

# The README has no table of contents of its own: on GitHub its last section is one. The site's is here.
CONTENTS = """

```{toctree}
:hidden:
:caption: Guides

docs/building
docs/transformers
docs/commands
docs/serving
docs/openai
docs/metrics
docs/deployment
docs/sizing
docs/parity
docs/ci
docs/glossary
```

```{toctree}
:hidden:
:caption: Runtimes

docs/tensorrt
docs/tensorrt-llm
docs/plugins
```

```{toctree}
:hidden:
:caption: Reference

docs/reference/ngpt
docs/reference/engines
docs/reference/triton_repo
docs/reference/errors
```

```{toctree}
:hidden:
:caption: The project

docs/DESIGN
CONTRIBUTING
docs/measurements/README
docs/measurements/METHOD
docs/measurements/triton-clients
docs/measurements/soak
docs/measurements/mutations
docs/measurements/hostile-files
docs/measurements/killed-builds
docs/SECURITY
CHANGELOG
```
"""


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the first page the site's table of contents."""
    if docname == root_doc:
        source[0] += CONTENTS


def copy_first_page(app: Sphinx, error: Exception | None) -> None:
    """The first page answers under the usual name, too."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", copy_first_page)
