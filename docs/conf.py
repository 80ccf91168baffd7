"""Settings of the documentation."""

import importlib.metadata

from invirtuo.metrics import METRICS

project = "invirtuo"
author = "The invirtuo authors"
copyright = "2026, The invirtuo authors"
version = release = importlib.metadata.version("invirtuo")

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
myst_enable_extensions = ["colon_fence", "substitution"]
myst_substitutions = {
    "metrics_table": "\n".join(
        ["| name | better | definition | reference |", "|---|---|---|---|"]
        + [f"| `{m.name}` | {m.direction} | {m.definition} | {m.reference} |" for m in METRICS.values()]
    )
}
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
exclude_patterns = ["generated"]

html_theme = "furo"
html_title = "invirtuo"
