"""Configuration of the documentation: `make docs` builds it into ``docs/_build/html``.

Nothing is fetched. Set ``DOCS_INTERSPHINX=1`` to link names of Python, torch and Lightning to their
own documentation, which needs a network.
"""

import logging
import os
import shutil
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lit_stability  # noqa: E402

project = "lit_stability"
author = "The lit_stability developers"
project_copyright = author
version = release = lit_stability.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lit_stability {release}"
pygments_dark_style = "github-dark"
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db7f5", "color-brand-content": "#7db7f5"},
}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the committed notebooks have their outputs
suppress_warnings = ["myst.header"]  # an included file begins below the title of its page
# A toctree ends in a pattern, so that a page can be added; Sphinx gives this warning no type.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(
    lambda record: "glob pattern" not in record.getMessage()
)

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # in the signature they would hide the defaults; "Args" describes them
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
python_maximum_signature_line_length = 88

default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    # Linked by intersphinx, where it is enabled.
    ("py:.*", r"(torch|lightning|pytorch_lightning|collections|contextlib|typing|pathlib)\b.*"),
    ("py:.*", r".*\._\w+"),  # a private base class
    ("py:.*", r"(Exception|RuntimeError|ValueError|TypeError|FileNotFoundError|Protocol)"),
]
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
    }
    if os.environ.get("DOCS_INTERSPHINX")
    else {}
)


def _copy_notebooks(app, config):
    """Copies the notebooks, as Sphinx reads only files below its folder."""
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        copy = Path(app.srcdir) / "gallery" / notebook.name
        if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
            shutil.copyfile(notebook, copy)


@cache
def _documented(domain):
    """Returns the full names of all documented objects by their last part."""
    found = {}
    for name, entry in domain.objects.items():
        if not entry.aliased:
            found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def _find_by_last_part(app, env, node, contnode):
    """Links the `Name` of a docstring, which does not say where the name is documented.

    A name in single quotes that is not documented, such as an option, is shown as code.
    """
    if node["refdomain"] != "py":
        return None
    domain = env.get_domain("py")
    found = _documented(domain).get(node["reftarget"].rpartition(".")[2], [])
    exact = [name for name in found if name == node["reftarget"]]
    classes = [name for name in found if domain.objects[name].objtype in ("class", "exception")]
    for names in (exact, classes, found):
        if len(names) == 1:
            document = node.get("refdoc", env.docname)
            return domain.resolve_xref(env, document, app.builder, "obj", names[0], node, contnode)
    return contnode if node["reftype"] == "obj" else None


_as_written = {}


def _keep_attribute(app, what, name, obj, options, lines):
    """Keeps the docstring of an attribute, whose first words napoleon would take for a type."""
    if what in ("attribute", "data", "property"):
        _as_written[name] = list(lines)


def _restore_attribute(app, what, name, obj, options, lines):
    lines[:] = _as_written.pop(name, lines)


def _show_indented_as_code(app, what, name, obj, options, lines):
    """Makes an indented block of a module's docstring a literal one, as it is in `help()`."""
    if what != "module":
        return
    shown, before = [], ""
    for line in lines:
        begins = line.startswith("    ") and not before.startswith("    ")
        if begins and not before.endswith("::"):
            shown += [".. code-block:: text", ""]
        shown.append(line)
        before = line or before
    lines[:] = shown


def setup(app):
    """Registers the functions above."""
    app.connect("autodoc-process-docstring", _show_indented_as_code, priority=50)
    app.connect("config-inited", _copy_notebooks)
    app.connect("autodoc-process-docstring", _keep_attribute, priority=100)
    app.connect("autodoc-process-docstring", _restore_attribute, priority=900)
    app.connect("missing-reference", _find_by_last_part)
