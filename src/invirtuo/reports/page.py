"""Reads a folder of results and renders the page."""

from __future__ import annotations

import base64
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invirtuo.metrics.scores import FLOOR, floor_note
from invirtuo.reports import benchmark, folder
from invirtuo.reports.effects import COLUMNS, coverage, effects_figure
from invirtuo.reports.figures import as_png, condition_panels, curves, panels, populations
from invirtuo.reports.genes import gene_data
from invirtuo.reports.render import render
from invirtuo.reports.tables import BASELINES, condition_tables, headline, number, published_table, score_table
from invirtuo.reports.verdict import verdict

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

__all__ = ["report"]

UNDER_PANELS = ("mmd_gex", "mmd_pca", "deg_recall")  # scores under cells of a benchmark, as in the figures of PRiMeFlow
CONDITIONS, SETS = 12, 15  # conditions of which sets of genes are shown, and how many sets of each
GENES = 12  # largest effects of a condition that are drawn
FILES = {
    "scores.csv": "scores, a row for each model, condition and metric",
    "effects.csv": "predicted and seen effects, a row for each gene and condition",
    "gene_sets.csv": "sets of genes that go up or down",
    "distributions.npz": "distributions of the values of genes",
    "predicted.h5ad": "predicted cells of the first model",
    "ahead.h5ad": "forecasts of the first model",
    "edges.csv": "its network",
    "models": "fitted models, for `invirtuo predict`",
    "history.csv": "losses by step",
    "panels.csv": "cells on two principal components",
    "umap.csv": "cells of the first model on a UMAP",
    "discrimination.csv": "what each score can tell apart here",
    "flags.csv": "what is suspect about predicted cells",
    "run.json": "data, split, settings, versions",
}
PICTURES = {
    "courses.png": (
        "Forecasts",
        "Genes that change most along the held-out courses: lines with intervals are forecast from the first state of "
        "a course, dots are means of its cells.",
    ),
    "network.png": (
        "Network",
        "The strongest edges, read from the field along the training courses: predictive dependencies, no proof of "
        "regulation.",
    ),
}
MAX_CELLS = 5000  # numbers in the tables by condition of a benchmark; beyond, the charts must do


def report(
    results: str | os.PathLike[str], out: str | os.PathLike[str] = "report.html", *, title: str | None = None
) -> Path:
    r"""Write one self-contained HTML page about a folder of results.

    Parameters
    ----------
    results
        Folder with ``scores.csv`` (columns ``condition``, ``metric``, ``value``, ``model``; optionally ``seed``,
        ``task``, ``direction``). Shown if present: ``panels.npz`` or ``panels.csv`` (``pc1``, ``pc2``, ``kind``,
        ``model``, ``condition``; with ``task`` one picture for each condition of a task), ``umap.csv`` (the same
        columns, of a UMAP), ``history.csv`` (``step``, ``model``, one column per quantity), ``effects.csv``
        (``condition``, ``gene``, ``effect``, ``low``, ``high``, ``real``; `invirtuo.bench.effects`; optionally ``q``
        and ``q_real``), with it ``distributions.npz`` (shares of cells by value, of every gene), ``gene_sets.csv``
        (``condition``, ``gene_set``, ``n_genes``, ``effect``, ``q``, ``real``, ``q_real``), of time courses the
        pictures ``courses.png`` and ``network.png``, and ``run.json`` (what was run; the keys ``title``, ``dataset``,
        ``split``, ``baselines``, ``floor``, ``effect level`` and ``notes`` are shown on their own, ``unit`` is what a
        condition is called in the verdict, anything else is listed); of generated populations ``genes.csv``
        (``model``, ``gene``, ``mean``, ``variance``, ``zeros``) and ``cells.csv`` (``model``,
        ``zeros``). A benchmark has more: ``costs.csv`` (``task``, ``model``, ``seed``, ``status``,
        ``error``, seconds, memory, parameters), ``discrimination.csv`` (``metric``, ``drf``, optionally ``task``;
        `invirtuo.metrics.calibration`), ``flags.csv`` (``model``, ``flag``, ``text``, optionally ``task``;
        `invirtuo.metrics.flags`), ``comparisons.csv`` (``task``, ``metric``, ``model``, ``against``, ``difference``,
        ``low``, ``high``, ``n_conditions``), ``published.csv`` (``task``, ``model``, ``name``, ``metric``, ``source``,
        ``published``, ``published_sd``, ``ours``, ``ours_sd``, ``difference``), and in ``run.json`` ``tasks`` (name to
        description) and ``directions`` (metric to "lower" or "higher" is better). With these, or with several tasks,
        the page also compares models over tasks.
    out
        The page to write; an existing one is replaced only when the new one is complete.
    title
        Heading; None takes ``title`` from ``run.json``.

    Returns
    -------
    Path of the page.

    Raises
    ------
    ValueError
        If the folder or its tables are missing, damaged or without the columns above.

    Examples
    --------
    >>> results = getfixture("tmp_path")
    >>> _ = (results / "scores.csv").write_text("condition,metric,value,model\nT|A,rmse_mean,0.2,mine\n")
    >>> report(results, results / "report.html").name
    'report.html'
    """
    # the tables of the folder; only scores.csv must be there
    path = Path(results)
    scores = folder.read_scores(path / "scores.csv")
    run = folder.read_run(path / "run.json")
    costs = folder.read_costs(path / "costs.csv")
    comparisons = folder.read_comparisons(path / "comparisons.csv")
    cells, mapped = folder.read_panels(path), folder.read_panels(path, "umap")
    history = folder.read_history(path / "history.csv")
    counted = folder.read_populations(path)
    effects = folder.read_effects(path / "effects.csv")
    genes, n_left_out = _genes(effects, path)

    # pictures, and the words above and below them
    by_task = cells is not None and (cells["task"] != "").any()
    picture, n_columns, left_out = panels(cells) if cells is not None and not by_task else ("", 0, "")
    umap, n_maps, _ = panels(mapped) if mapped is not None else ("", 0, "")
    structure, n_origins = populations(*counted) if counted is not None else ("", 0)
    discrimination = folder.read_discrimination(path / "discrimination.csv")
    sections = _sections(scores, run, costs, folder.read_flags(path / "flags.csv"), discrimination)
    for section in sections:
        section["drawn"] = _drawn(cells, section) if by_task else []
    told = sections if len(sections) == 1 or "unit" in run else []
    unit = str(run.get("unit", "held-out condition"))
    verdicts = (verdict(section["scores"], section["table"], effects, unit) for section in told)
    _set_beside(sections, folder.read_published(path / "published.csv"))
    title = title or run.pop("title", None) or "How well were the cells predicted?"
    subtitle = [str(run[key]) for key in ("dataset", "split") if isinstance(run.get(key), str)]
    settings = {key: value for key, value in run.items() if key not in ("notes", "unit")}

    # what the template asks for
    shown: dict[str, Any] = {"title": title, "subtitle": " · ".join(subtitle)}
    shown["verdict"] = next(filter(None, verdicts), "")
    shown |= {"sections": sections, "benchmark": _benchmark(scores, sections, costs, comparisons)}
    shown |= {"panels": picture, "panels_columns": n_columns, "panels_note": left_out}
    shown |= {"umap": umap, "umap_columns": n_maps}
    shown |= {"genes": genes, "genes_left_out": n_left_out, "files": _files(path, Path(out))}
    shown |= {"effects": _effects(effects, run), "populations": structure, "populations_columns": n_origins}
    shown |= {"pictures": _pictures(path), "gene_sets": _gene_sets(folder.read_gene_sets(path / "gene_sets.csv"))}
    shown |= {"curves": curves(history) if history is not None else "", "notes": _notes(run), "run": _flat(settings)}
    return render("page.html.j2", shown, out)


def _sections(
    scores: pd.DataFrame,
    run: dict[str, Any],
    costs: pd.DataFrame | None,
    flags: pd.DataFrame,
    discrimination: pd.DataFrame,
) -> list[dict[str, Any]]:
    """One section per task, in the order of the table."""
    baselines = run.get("baselines", BASELINES)
    floor = run.get("floor", FLOOR)
    about = run["tasks"] if isinstance(run.get("tasks"), dict) else {}
    # scores from elsewhere may say which direction is better
    if "direction" not in scores and isinstance(run.get("directions"), dict):
        scores = scores.assign(direction=scores["metric"].map(run["directions"]))
    found = []
    for task, own in scores.groupby("task", sort=False):
        failed = benchmark.failed_models(costs[costs["task"] == task]) if costs is not None else {}
        known = discrimination[discrimination["task"] == task]
        table = score_table(own, baselines, floor, failed, known.groupby("metric")["drf"].mean().to_dict())
        section = {"task": task, "about": str(about.get(task, "")), "scores": own}
        section |= {"headline": headline(table), "table": table, "conditions": condition_tables(own, table)}
        section["floor_note"] = floor_note(own)
        section["flags"] = _flagged(flags[flags["task"] == task])
        section["n_seeds"] = own["seed"].nunique() if "seed" in own else 1
        found.append(section)
    return found


def _drawn(cells: pd.DataFrame, section: dict[str, Any]) -> list[dict[str, str]]:
    """A picture of each condition of a task: real cells beside those of every model, with scores of the same seed."""
    own = cells[cells["task"] == section["task"]]
    predicted = own[own["kind"] == "predicted"]
    scores = section["scores"]
    if "seed" in scores and "seed" in own:
        scores = scores[scores["seed"].isin(own["seed"].unique())]
    columns = {column.name: column for column in section["table"].columns}
    found = []
    for condition in dict.fromkeys(predicted["condition"]):
        values = scores[scores["condition"] == condition].groupby(["model", "metric"])["value"].mean()
        lines = {}
        for model in dict.fromkeys(predicted["model"]):
            texts = []
            for name in UNDER_PANELS:
                if (model, name) in values.index:
                    label = columns[name].label if name in columns else name
                    texts.append(f"{label}: {values[model, name]:.2f}")
            lines[model] = "\n".join(texts)
        found.append({"condition": condition, "picture": condition_panels(own, condition, lines)})
    return found


def _set_beside(sections: list[dict[str, Any]], published: pd.DataFrame | None) -> None:
    """What a paper printed for a task goes into its section."""
    for section in sections:
        own = published[published["task"] == section["task"]] if published is not None else None
        section["published"] = published_table(own, section["table"]) if own is not None else None


def _flagged(flags: pd.DataFrame) -> list[tuple[str, str]]:
    """Model and what is suspect about its cells, in words; of several seeds and folds the first."""
    once = flags.drop_duplicates(["model", "flag"])
    return [(str(model), "; ".join(own["text"])) for model, own in once.groupby("model", sort=False)]


def _benchmark(
    scores: pd.DataFrame,
    sections: list[dict[str, Any]],
    costs: pd.DataFrame | None,
    comparisons: pd.DataFrame | None,
) -> dict[str, Any] | None:
    """What compares models over tasks; None for a single comparison. Charts of a task go into its section."""
    if not benchmark.is_benchmark(scores, (costs, comparisons)):
        return None

    # within a task
    tables = {section["task"]: section["table"] for section in sections}
    for section in sections:
        differences = comparisons[comparisons["task"] == section["task"]] if comparisons is not None else None
        section |= benchmark.task_section(section["scores"], section["table"], differences)
        n_cells = sum(len(table["rows"]) * len(table["models"]) for table in section["conditions"])
        if n_cells > MAX_CELLS:
            section["conditions"] = []

    # over all tasks
    found: dict[str, Any] = {"overview": benchmark.overview(tables), "costs": None, "failures": [], "lost": []}
    if costs is not None:
        found["costs"] = benchmark.costs_section(costs, tables)
        found["failures"] = benchmark.failures(costs)
        found["lost"] = [task for task in dict.fromkeys(costs["task"]) if task not in tables]
    return found


def _effects(table: pd.DataFrame | None, run: dict[str, Any]) -> dict[str, Any] | None:
    """Picture of the largest effects, its number of columns, and how often intervals hold."""
    if table is None:
        return None
    share, level = coverage(table), run.get("effect level")
    covered = "" if math.isnan(share) else f"{share:.0%}"
    named_level = f"{level:.0%}" if isinstance(level, int | float) else ""
    picture = as_png(effects_figure(table, GENES))
    n_columns = min(table["condition"].nunique(), COLUMNS)
    return {"picture": picture, "columns": n_columns, "n_genes": GENES, "level": named_level, "covered": covered}


def _genes(effects: pd.DataFrame | None, path: Path) -> tuple[Markup | str, int]:
    """What the script of the page shows of every gene, and the number of conditions that it leaves out."""
    if effects is None:
        return "", 0
    return gene_data(effects, folder.read_distributions(path / "distributions.npz", effects))


def _gene_sets(table: pd.DataFrame | None) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Conditions, and the sets of genes that their predictions change most, as text."""
    if table is None:
        return []
    found = []
    for condition, own in list(table.groupby("condition", sort=False))[:CONDITIONS]:
        rows = []
        for row in own.head(SETS).itertuples():
            cells = (number(value) for value in (row.effect, row.q, row.real, row.q_real))
            rows.append((str(row.gene_set), f"{row.n_genes:.0f}", *cells))
        found.append((str(condition), rows))
    return found


def _pictures(path: Path) -> list[dict[str, str]]:
    """Pictures of time courses that lie in the folder, with words."""
    found = []
    for name, (title, text) in PICTURES.items():
        if (path / name).is_file():
            address = "data:image/png;base64," + base64.b64encode((path / name).read_bytes()).decode()
            found.append({"title": title, "text": text, "address": address})
    return found


def _files(path: Path, out: Path) -> list[tuple[str, str]]:
    """Files beside the page that it is made of, and what they hold."""
    if path.resolve() != out.resolve().parent:
        return []
    return [(name, text) for name, text in FILES.items() if (path / name).exists()]


def _notes(run: dict[str, Any]) -> list[str]:
    notes = run.get("notes", [])
    return [str(note) for note in notes] if isinstance(notes, list) else [str(notes)]


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines "a.b" -> value."""
    lines = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            lines += _flat(value, f"{name}.")
        else:
            lines.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return lines
