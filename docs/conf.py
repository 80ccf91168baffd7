"""Settings of the documentation."""

import importlib.metadata

from invirtuo.cells.datasets import DATASETS
from invirtuo.metrics import METRICS

project = "invirtuo"
author = "The invirtuo authors"
copyright = "2026, The invirtuo authors"
version = release = importlib.metadata.version("invirtuo")

extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc"]  # myst_nb brings myst_parser
nb_execution_mode = "off"  # notebooks are shown with the outputs that they were stored with
myst_enable_extensions = ["colon_fence", "substitution"]
myst_substitutions = {
    "metrics_table": "\n".join(
        ["| name | better | definition | reference |", "|---|---|---|---|"]
        + [f"| `{m.name}` | {m.direction} | {m.definition} | {m.reference} |" for m in METRICS.values()]
    ),
    "data_table": "\n".join(
        ["| name | what | cells x genes | licence | citation | how to get it |", "|---|---|---|---|---|---|"]
        + [
            f"| `{name}` | {d.title} | {d.shape[0]:,} x {d.shape[1]:,} | {d.licence} | {d.citation} | {d.access} |"
            for name, d in DATASETS.items()
        ]
    ),
}
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
exclude_patterns = ["generated"]

html_theme = "furo"
html_title = "invirtuo"
