"""Settings of the documentation."""

import importlib.metadata
import os
import re
import warnings
from itertools import pairwise
from pathlib import Path

import click
import typer.main
from sphinx.ext.autosummary import autosummary_toc

from invirtuo.cells.datasets import DATASETS
from invirtuo.cli import PANELS, app
from invirtuo.metrics import METRICS
from invirtuo.models import MODELS

project = "invirtuo"
author = "The invirtuo authors"
copyright = "2026, The invirtuo authors"
version = release = importlib.metadata.version("invirtuo")

extensions = [
    "myst_nb",  # brings myst_parser
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
nb_execution_mode = "off"  # notebooks are shown with the outputs that they were stored with
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
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

templates_path = ["_templates"]
exclude_patterns = ["_templates"]
html_theme = "furo"
html_title = "invirtuo"
copybutton_exclude = ".linenos, .gp, .go"

# pages of other packages are linked where they can be reached; a build needs no network
if os.environ.get("READTHEDOCS") or os.environ.get("INVIRTUO_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }

# ---- pages of the API ------------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autosummary_generate = True
autosummary_filename_map = {"invirtuo.metrics.metric": "invirtuo.metrics.metric-function"}  # beside metrics.Metric
napoleon_google_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
warnings.filterwarnings(
    "ignore", "invirtuo.* is now invirtuo", DeprecationWarning
)  # names as iv.preprocess are asked for


def _of_models():
    """What the template of a class shows of a model beside the class: its Config, and its presets."""
    shown, configs = {}, set()
    for model in MODELS.values():
        config = model.Config
        presets = [(name, preset.source or "ours") for name, preset in model.PRESETS.items()]
        shown[f"invirtuo.models.{model.__name__}"] = {
            "module": config.__module__,
            "config": config.__qualname__,
            "shared": config in configs,
            "presets": presets,
        }
        configs.add(config)
    return shown


def _rooms():
    """Address and title of the page whose table lists a name, by name."""
    found = {}
    for page in (Path(__file__).parent / "api").glob("*.md"):
        title, *lines = page.read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if re.fullmatch(r"   [\w.]+", line)]
        found |= {f"invirtuo.{name}": (page.stem, title.removeprefix("# ")) for name in names}
    return found


autosummary_context = {"models": _of_models(), "rooms": _rooms()}


def remove_stale_pages(_):
    """Remove the pages of names that no table lists any more."""
    kept = {autosummary_filename_map.get(name, name) for name in autosummary_context["rooms"]}
    for page in (Path(__file__).parent / "generated").glob("invirtuo.*.rst"):
        if page.stem not in kept:
            page.unlink()


TABLES = {  # registries and names of types, which have no docstring of their own
    "AnyMatrix": "A matrix of cells and genes (n, g): CSR or a dense array.",
    "COEFFICIENTS": "Weights of x0 and x1 at time t, and their derivatives, by name of a path.",
    "Conditions": "What asks for conditions takes a table, a mapping, a name, or several of these.",
    "DATASETS": "Data sets by name, with file, licence, citation and roles of columns.",
    "EVALUATIONS": "How often a step of a solver asks for the velocity, by name of the solver.",
    "METRICS": "Metrics by name, see `Metric`.",
    "MODELS": "Classes of the models of this package, by name.",
    "PATHS": "Paths from x0 to x1, by name.",
    "PENALTIES": "Penalties of sparse neural ODEs, by name.",
    "PROFILES": "Names of metrics that are asked for together, by name of the profile.",
    "PROTOCOLS": "Names of the protocols of scPertEval.",
    "SAMPLERS": "Samplers by name: what `sampler` of a model may be.",
    "SOLVERS": "Solvers with fixed steps, by name.",
    "SOURCES": "What vectors of perturbations can be read from, with what each must hold.",
    "SPLITS": "Splits that a name can ask for, on the command line and in tasks.",
    "Sampler": "A function (layout, batch size, generator) that gives the rows of one batch after the other.",
    "TASKS": "Tasks of `benchmark`, by name.",
    "TRANSFORMS": "Classes of transforms by name, to read those of a saved model.",
    "VIEWS": "How a `Pair` is looked at before a metric sees it, by name of the view.",
}


RETURNED = "RETURNED"  # stands for the section on what is returned while napoleon looks for names and types
returned: list[str] = []


def keep_returned(_, __, ___, ____, _____, lines):
    """Before napoleon: put what is returned aside."""
    heads = [i - 1 for i in range(1, len(lines)) if re.fullmatch("-{3,}", lines[i])]
    for head, end in pairwise([*heads, len(lines)]):
        if lines[head] == "Returns":
            returned[:] = [f"   {line}".rstrip() for line in lines[head + 2 : end]]
            lines[head + 2 : end] = [RETURNED, ""]
            return


def put_returned(_, __, ___, ____, _____, lines):
    """After napoleon: it is text, as it stands."""
    for i, line in enumerate(lines):
        if line == f":returns: *{RETURNED}*":
            lines[i : i + 1] = [":returns:", *returned, ""]
            return


def tidy_docstring(_, __, name, value, ___, lines):
    """Describe what has no docstring of its own, and keep text from being read as markup."""
    if (text := TABLES.get(name.rpartition(".")[2])) and not callable(value):
        keys = f"Keys: {', '.join(f'``{key}``' for key in value)}." if isinstance(value, dict) else ""
        lines[:] = [text, "", keys]
    for i, line in enumerate(lines):
        line = re.sub(r" (\[\d+\])_", "", line)  # literature stands below each docstring, and is not numbered anew
        line = re.sub(r"^\.\. (\[\d+\]) ", "", line)
        lines[i] = re.sub(r"^(\w+ :) (.+), default (.+)$", r"\1 *\2*, default ``\3``", line)  # words are no classes


def keep_sidebar_short(_, doctree):
    """Leave the pages of single names out of the tree that every page shows: hundreds of lines in hundreds of pages."""
    for listed in list(doctree.findall(autosummary_toc)):
        listed.parent.remove(listed)


# ---- page of the command line ----------------------------------------------------------------------------------------


def _options(command):
    """A definition list of what a verb takes."""
    lines = []
    for param in command.params:
        if param.name == "help" or getattr(param, "hidden", False):
            continue
        is_flag = getattr(param, "is_flag", False)
        is_option = param.param_type_name == "option"
        names = ", ".join([*param.opts, *param.secondary_opts]) if is_option else param.name.upper()
        default = (
            ""
            if is_flag or param.default in (None, (), []) or callable(param.default)
            else f" Default: {param.default}."
        )
        text = " ".join((getattr(param, "help", None) or "").split())
        lines += [f"`{names}`", f": {text}{default}", ""]
    return lines


def _verb(name, command, level):
    """The section of one verb."""
    usage = " ".join(command.collect_usage_pieces(click.Context(command)))
    return [
        "#" * level + f" {name}",
        "",
        command.help or "",
        "",
        "```sh",
        f"invirtuo {name} {usage}",
        "```",
        "",
        *_options(command),
    ]


def write_command_line(_):
    """Write the page of the command line from the verbs themselves."""
    verbs = dict(typer.main.get_command(app).commands)
    steps = verbs.pop("vcc").commands
    names = {panel: [verb.__name__.replace("_", "-") for verb in made] for panel, made in PANELS.items()}
    lines = [
        "# Command line",
        "",
        "Every verb is one call of the Python API. `invirtuo VERB --help` says the same.",
        "",
    ]
    for panel, chosen in {"What there is": ["list"], **names}.items():
        lines += [f"## {panel}", ""]
        for name in chosen:
            lines += _verb(name, verbs[name], 3)
    lines += ["## The Virtual Cell Challenge", ""]
    for name, command in steps.items():
        lines += _verb(f"vcc {name}", command, 3)
    page = Path(__file__).parent / "generated" / "command-line.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(lines), encoding="utf-8")


def setup(app):
    app.connect("doctree-read", keep_sidebar_short, priority=1)
    app.connect("autodoc-process-docstring", tidy_docstring, priority=100)
    app.connect("autodoc-process-docstring", keep_returned, priority=200)
    app.connect("autodoc-process-docstring", put_returned, priority=900)
    app.connect("builder-inited", remove_stale_pages, priority=50)
    app.connect("builder-inited", write_command_line, priority=100)
