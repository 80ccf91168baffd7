"""Everything about a data set that would trip a model: genes, values, labels, conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.values import check_values, look, require_counts, require_log
from invirtuo.errors import preview, require_column

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = [
    "EFFECT_COLUMNS",
    "SCORE_COLUMNS",
    "check",
    "check_genes",
    "label_findings",
    "labels",
]

FEW_CELLS = 20
MISSING = {"", "nan", "none", "na", "n/a", "null", "<na>"}
CONTROLS = {"control", "ctrl", "non-targeting", "non_targeting", "nontargeting", "nt", "ntc", "dmso", "vehicle", "mock"}
SCORE_COLUMNS = {
    "condition",
    "perturbation",
    "metric",
    "value",
    "direction",
    "n_pred",
    "n_real",
    "model",
    "task",
    "seed",
    "_group",
}
EFFECT_COLUMNS = {"condition", "gene", "control", "effect", "low", "high", "real"}
RESERVED = SCORE_COLUMNS | EFFECT_COLUMNS

Finding = tuple[str, str, str]  # level, what it is about, a sentence


def check(
    adata: AnnData, design: Design | None = None, *, expect: Literal["log", "counts"] | None = None
) -> pd.DataFrame:
    """List everything about a data set that would trip a model, worst first; raises nothing.

    Parameters
    ----------
    adata
        Cells to look at; not changed.
    design
        Which columns mean what; None leaves the conditions out.
    expect
        What X should hold: "log" for log1p of depth-normalised counts, "counts" for raw counts.

    Returns
    -------
    DataFrame with columns ``level`` ("error", "warning" or "note"), ``about`` and ``finding``.

    Examples
    --------
    >>> import invirtuo as iv
    >>> iv.preprocess.check(iv.datasets.toy(), expect="counts")["level"].unique().tolist()
    ['note']
    """
    # what a model would refuse, in the words of its error
    checks: list[tuple[str, Callable[[], object]]] = []
    checks.append(("genes", lambda: check_genes(adata)))
    checks.append(("values", lambda: check_values(adata, allow_negative=True)))
    if expect == "log":
        checks.append(("scale", lambda: require_log(adata)))
    elif expect is not None:
        checks.append(("scale", lambda: require_counts(adata)))
    if design is not None:
        checks.append(("design", lambda: design.encode(adata.obs)))

    # every check runs, so that one call names all that is wrong
    rows: list[Finding] = [("note", "shape", f"{adata.n_obs:,} cells x {adata.n_vars:,} genes")]
    for about, test in checks:
        try:
            test()
        except ValueError as error:
            rows.append(("error", about, str(error)))

    # what it would take, and a person may have meant otherwise
    if not any(level == "error" for level, *_ in rows):
        found = look(adata.X)
        rows.append(("note" if found.is_usual else "warning", "scale", f"X looks like {found.text}"))
        rows += _cell_findings(adata)
        if design is not None:
            rows += [("warning", "labels", finding) for finding in label_findings(adata.obs, design)]
            is_course = design.perturbation is None and design.time is not None
            rows += (_course_findings if is_course else _condition_findings)(adata.obs, design)
    order = {"error": 0, "warning": 1, "note": 2}
    rows.sort(key=lambda row: order[row[0]])
    return Findings(rows, columns=["level", "about", "finding"])


class Findings(pd.DataFrame):  # type: ignore[misc]  # pandas ships no types
    """A table of sentences, which shows them whole."""

    @property
    def _constructor(self) -> type[Findings]:
        """Of the rows that are chosen of it."""
        return Findings

    def __repr__(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return str(self.to_string(index=False, justify="left", formatters={c: _padded(self[c]) for c in self}))

    def _repr_html_(self) -> str | None:
        with pd.option_context("display.max_colwidth", None):
            html: str | None = super()._repr_html_()
            return html


def _padded(column: pd.Series) -> Callable[[object], str]:
    """What writes the values of a column, the shorter ones filled up on the right."""
    width = column.astype(str).str.len().max()
    return lambda value: f"{value!s:<{width}}"


def check_genes(adata: AnnData) -> None:
    """Raise ValueError if there are no cells or genes, or gene names are empty, missing or repeated."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"the data hold {adata.n_obs} cells and {adata.n_vars} genes; expected at least one of each")
    names = pd.Index(adata.var_names)
    empty = int((names.isna() | (names.astype(str).str.strip() == "")).sum())
    if empty:
        raise ValueError(f"{empty} genes have no name in var_names; name or remove them")
    if names.has_duplicates:
        repeated = names[names.duplicated()].unique()
        raise ValueError(
            f"{len(repeated)} gene names occur more than once (for example {', '.join(map(str, repeated[:5]))}); "
            "expected unique names. Sum or drop the copies, or call adata.var_names_make_unique()"
        )


def label_findings(obs: pd.DataFrame, design: Design) -> list[str]:
    """Labels that a person may have meant otherwise, and columns whose names our tables use; a sentence on each kind.

    Parameters
    ----------
    obs
        (n, columns), one row per cell, known to be valid for the Design.
    design
        Which columns mean what.
    """
    found = []

    # labels as they are written, then as the Design reads them
    for column in design.attributes:
        written = [str(label) for label in obs[column].dropna().unique()]
        found += [f"obs[{column!r}]: {text}" for text in _alike(written) if text]
    if design.perturbation is not None:
        labels = [str(label) for label in obs[design.perturbation].unique()]
        found += [f"obs[{design.perturbation!r}]: {text}" for text in _unlikely_perturbations(labels, design)]
    if design.dose is not None:
        table = design.tidy(obs)
        # a perturbation without a dose is none
        undosed = table[(table[design.dose] == 0) & ~design.is_control(table)]
        if len(undosed):
            names = preview(sorted(set(undosed[design.perturbation])))
            found.append(
                f"obs[{design.dose!r}] is 0 for {len(undosed):,} perturbed cells ({names}); label them as control"
            )

    # columns of obs become columns of the tables of scores
    if taken := sorted(set(design.columns) & RESERVED - {design.perturbation}):
        found.append(
            f"columns {preview(taken)} have names that tables of scores and effects use; rename them to be scored"
        )
    return found


def _alike(labels: Sequence[str]) -> Iterator[str]:
    """What is wrong with the labels of one column, taken as they are written."""
    if spaced := [label for label in labels if label != label.strip()]:
        yield f"labels with space around them, read without it: {preview(map(repr, spaced))}"
    if missing := [label for label in labels if label.strip().casefold() in MISSING]:
        yield f"labels that look like missing values (nan): {preview(map(repr, missing))}; remove or label these cells"
    for difference, key in (("case", str.casefold), ("spaces or signs", _letters), ("digits", _number)):
        spellings: dict[str, set[str]] = {}
        for label in {label.strip() for label in labels}:
            spellings.setdefault(key(label), set()).add(label)
        if twins := _several(spellings):
            yield f"labels that differ in {difference} only: {preview(twins)}; rename one if they mean the same"


def _several(spellings: dict[str, set[str]]) -> list[str]:
    """The spellings of every meaning that is written in several ways, joined by "and"."""
    groups = [sorted(spellings[meaning]) for meaning in sorted(spellings)]
    return [" and ".join(map(repr, group)) for group in groups if len(group) > 1]


def _unlikely_perturbations(labels: Sequence[str], design: Design) -> Iterator[str]:
    """What is wrong with perturbation labels, taken as the Design reads them."""
    # a separator that is part of a name makes "combinations" of what never occurs alone
    parts = {label: design.parts(label) for label in labels}
    alone = {names[0] for names in parts.values() if len(names) == 1}
    examples = []
    for label, names in parts.items():
        never_alone = [name for name in names if name not in alone]
        if never_alone:
            examples.append(f"{' and '.join(map(repr, never_alone))} of {label!r}")
    if examples:
        yield (
            f"parts of combinations that never occur alone: {preview(examples)}; if {design.separator!r} is part of a "
            "name, pass another separator"
        )
    spellings: dict[str, set[str]] = {}
    for label in labels:
        # two spellings of one perturbation are one condition
        spellings.setdefault(design.label(label), set()).add(label.strip())
    if several := _several(spellings):
        yield f"labels that mean the same perturbation and are read as one: {preview(several)}"
    if controls := [label for label in labels if label.strip().casefold() in CONTROLS and design.parts(label)]:
        yield f"{preview(map(repr, controls))} sounds like a control, but the control is {design.control!r}"


def _letters(label: str) -> str:
    """A label without what people write in different ways: spaces, dashes, underscores."""
    return re.sub(r"[\s_-]", "", label)


def _number(label: str) -> str:
    """A label that is a number as that number; "1" and "1.0" are alike."""
    try:
        return repr(float(label))
    except ValueError:
        return label


def _cell_findings(adata: AnnData) -> list[Finding]:
    """Cells that are there twice, by name or by their values."""
    found = []
    if adata.obs_names.has_duplicates:
        found.append(("warning", "cells", "cell names repeat; call adata.obs_names_make_unique()"))
    x = adata.X
    if sparse.issparse(x) or isinstance(x, np.ndarray):
        weights = np.random.default_rng(0).random(adata.n_vars)
        sketch = np.asarray(x @ weights).ravel()  # equal cells have equal sums, others hardly ever
        repeated = pd.Series(sketch[sketch != 0]).duplicated(keep=False)
        if repeated.sum() > len(sketch) / 2:
            found.append(("warning", "cells", f"{int(repeated.sum()):,} cells have the values of another cell"))
    return found


def _condition_findings(obs: pd.DataFrame, design: Design) -> list[Finding]:
    """How many conditions there are, and which are short of cells or of controls."""
    is_control = design.is_control(obs)
    groups = design.groups(obs)
    names = design.names(obs)

    # short of cells, then short of controls
    sizes = names.value_counts()
    few = sizes[sizes < FEW_CELLS]
    if design.perturbation is None:
        found = [("note", "conditions", f"no perturbation; {names.nunique()} groups of cells")]
    else:
        n_perturbed = names[~is_control].nunique()
        n_controls = int(is_control.sum())
        text = (
            f"{len(design.perturbations)} single perturbations, {n_perturbed} perturbed conditions in "
            f"{groups.nunique()} covariate groups, {n_controls:,} control cells"
        )
        found = [("note", "conditions", text)]
        uncontrolled = sorted(set(groups) - set(groups[is_control]))
        if uncontrolled:
            text = f"no control cells in {len(uncontrolled)} covariate groups: {preview(uncontrolled)}"
            found.append(("warning", "controls", text))
    if len(few):
        text = f"{len(few)} conditions have fewer than {FEW_CELLS} cells: {preview(few.index)}; their scores are noise"
        found.append(("warning", "conditions", text))
    return found


def _course_findings(obs: pd.DataFrame, design: Design) -> list[Finding]:
    """How many time courses there are, how far they reach, and which can hardly be followed."""
    time = pd.to_numeric(obs[design.time]).astype(float)
    by_course = time.groupby(design.groups(obs).to_numpy()).agg(["size", "nunique", "min", "max"])
    span = f"{design.time} from {time.min():.3g} to {time.max():.3g}"
    found = [("note", "courses", f"{len(by_course)} time courses by {preview(design.covariates)}; {span}")]
    still = by_course.index[by_course["nunique"] < 2]
    if len(still):
        found.append(("warning", "courses", f"{len(still)} courses have one time only: {preview(still)}"))
    late = by_course.index[by_course["min"] > time.min() + 0.25 * (time.max() - time.min())]
    if len(late):
        text = f"{len(late)} courses begin after a quarter of the time: {preview(late)}; a forecast starts there"
        found.append(("warning", "courses", text))
    return found


def labels(adata: AnnData, by: str, name: str = "the data") -> np.ndarray:
    """(n,) labels of the cells as text.

    Raises
    ------
    ValueError
        If obs has no such column.
    """
    require_column(adata.obs, by, name, allow_missing=True)
    found: np.ndarray = adata.obs[by].astype(str).to_numpy()
    return found
