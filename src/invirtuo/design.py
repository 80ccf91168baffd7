"""Design: what the columns of obs mean, and how their labels become tensors.

It knows nothing of expression values and of models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
import torch

from invirtuo.batch import Condition
from invirtuo.display import Rows, Shown
from invirtuo.errors import preview, require_column, with_likely

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Design"]


@dataclass(frozen=True, repr=False)
class Design(Shown):
    """Column roles and levels of an experiment.

    Made by :meth:`from_adata`; the levels are sorted by name, so that the same labels always give the same tensors.

    A label has one meaning however it is written: space around it does not count, the parts of a combination are sorted
    and each counts once, and parts that say control are dropped. With ``separator="+"`` and ``control="ctrl"`` the
    labels ``B+A``, ``A + B`` and ``A+B+ctrl`` are the perturbation ``A+B``, ``A+ctrl`` is ``A``, and ``ctrl+ctrl`` is
    ``ctrl``. Whatever the Design gives (names, groups, tables, tensors) is in this canonical form.

    Parameters
    ----------
    perturbation
        Column of obs with the perturbation label of each cell; combinations are joined by `separator`. None: nothing
        was perturbed, as in an atlas; only models that generate populations take such a Design.
    control
        Label of the control cells in that column.
    perturbations
        Names of the single perturbations, without the control.
    covariates
        Column name to the levels of that column (cell type, donor, treatment, ...).
    dose
        Numeric column with the dose, or None. A dose enters as log1p(dose) / log1p(dose_max).
    dose_max
        Largest dose seen.
    time
        Numeric column with time, or None.
    separator
        Joins the parts of a combination, for example ``"A+B"``.
    unknown
        Label of cells whose covariate is not known; NaN is read as it. None: a missing covariate is an error.
    features
        A vector for every single perturbation, (p, f), or empty. Networks then see vectors instead of one-hots, and
        can be asked for perturbations that were never trained on.
    batch
        Column with technical batches (plates, lanes, days), or None. It belongs to no condition: names, splits and
        scores do not know it. In training, cells are held against control cells of their own batch where it has some.

    Examples
    --------
    >>> import invirtuo as iv
    >>> design = iv.Design.from_adata(iv.datasets.toy(), perturbation="perturbation", control="control",
    ...                               covariates=["cell_type"])
    >>> design.perturbations[:2]
    ('A', 'B')
    """

    perturbation: str | None = None
    control: str | None = None
    perturbations: tuple[str, ...] = ()
    covariates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dose: str | None = None
    dose_max: float = 1.0
    time: str | None = None
    separator: str = "+"
    unknown: str | None = None
    features: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    batch: str | None = None

    @classmethod
    def from_adata(
        cls,
        adata: AnnData | pd.DataFrame,
        *,
        perturbation: str | None = None,
        control: str | float | None = None,
        covariates: Sequence[str] | str | None = (),
        dose: str | None = None,
        time: str | None = None,
        separator: str = "+",
        unknown: str | None = None,
        features: pd.DataFrame | None = None,
        batch: str | None = None,
    ) -> Self:
        """Read roles and levels from the obs of an AnnData (or from a DataFrame like it).

        Parameters
        ----------
        adata, perturbation, control, covariates, dose, time, separator, unknown, batch
            See :class:`Design`.
        features
            A row of numbers for each perturbation, named by the index. Rows for perturbations that do not occur make
            these known as well. Networks see the numbers as they are: bring the columns to a scale of about 1.

        Raises
        ------
        ValueError
            If a column is missing, holds missing values or has two roles, the control label does not occur or is given
            without its column, a label holds ``|`` (which joins labels in the names of conditions), a dose is negative,
            or the features lack a perturbation.
        """
        obs = adata if isinstance(adata, pd.DataFrame) else adata.obs
        covariates = [covariates] if isinstance(covariates, str) else list(covariates or ())
        if (perturbation is None) != (control is None):
            raise ValueError(
                f"perturbation is {perturbation!r} and control is {control!r}; give both, or neither for data in which "
                "nothing was perturbed"
            )

        # every column is there, has a label in every row, and one role
        named = {"perturbation": perturbation, "dose": dose, "time": time, "batch": batch}
        roles = [(role, column) for role, column in named.items() if column is not None]
        roles += [("covariates", name) for name in covariates]
        for role, column in roles:
            _check_column(obs, column, role, missing=role == "covariates" and unknown is not None)
        uses = Counter(column for _, column in roles)
        if repeated := [column for column, n in uses.items() if n > 1]:
            raise ValueError(f"column(s) {preview(repeated)} have more than one role; name each column once")

        # a Design without levels reads labels in their canonical form, from which the levels follow
        control = None if control is None else str(control).strip()
        columns = cls(
            perturbation=perturbation,
            control=control,
            covariates=dict.fromkeys(covariates, ()),
            dose=dose,
            time=time,
            separator=separator,
            unknown=unknown,
            batch=batch,
        )

        # levels of every column, as the data have them
        table = columns.tidy(obs)
        observed = columns._parts_in(table)
        perturbations = tuple(sorted(observed))
        levels = {name: _levels(table[name], unknown) for name in covariates}
        dose_max = float(table[dose].max()) if dose else 1.0
        if dose_max == 0:
            dose_max = 1.0  # every dose is 0, and stays 0
        design = replace(columns, perturbations=perturbations, covariates=levels, dose_max=dose_max)
        return design if features is None else design.with_features(features)

    def with_features(self, features: pd.DataFrame) -> Self:
        """The same Design with a vector for every perturbation; rows for others make these known as well."""
        vectors = _vectors(features, set(self.perturbations))
        names = tuple(sorted(vectors))
        return replace(self, perturbations=names, features=tuple(vectors[name] for name in names))

    @property
    def code_width(self) -> int:
        """Width of a perturbation as networks see it: f with features, else p."""
        return len(self.features[0]) if self.features else len(self.perturbations)

    @property
    def columns(self) -> list[str]:
        """Columns of obs that say which condition a cell belongs to: covariates, perturbation, dose, time."""
        return [*self.covariates, *[c for c in (self.perturbation, self.dose, self.time) if c is not None]]

    @property
    def attributes(self) -> list[str]:
        """Columns of obs with labels: covariates and perturbation."""
        return [*self.covariates, *([] if self.perturbation is None else [self.perturbation])]

    def parts(self, label: str) -> tuple[str, ...]:
        """Single perturbations of a label, sorted, each once; () for the control.

        Raises
        ------
        ValueError
            If a part is empty, as in ``"A++B"``.
        """
        label = label.strip()
        if label == self.control:
            return ()
        parts = _split(label, self.separator)
        # "ctrl+ctrl": its part alone says control as well
        control_parts = _split(self.control, self.separator) if self.control else set()
        unperturbed = control_parts if len(control_parts) == 1 else {self.control}
        return tuple(sorted(parts - unperturbed))

    def label(self, label: str) -> str:
        """Canonical form of a perturbation label: its parts, sorted and joined; the control label if there are none."""
        parts = self.parts(label)
        return self.separator.join(parts) if parts else str(self.control)

    def value(self, column: str, value: object) -> str | float:
        """Canonical form of one value of a column: a label, or a number for dose and time."""
        if column in (self.dose, self.time):
            return float(_numeric(pd.DataFrame({column: [value]}), column).iloc[0])
        text = str(value).strip()
        return self.label(text) if column == self.perturbation else text

    def batches(self, obs: pd.DataFrame) -> np.ndarray | None:
        """(n,) number of the technical batch of each row, from 0; None without batches, or without their column."""
        if self.batch is None or self.batch not in obs:
            return None
        _check_column(obs, self.batch, "design")
        codes: np.ndarray = pd.factorize(obs[self.batch].astype(str), sort=True)[0]
        return codes

    def is_control(self, obs: pd.DataFrame) -> np.ndarray:
        """(n,) bool, True for cells that carry the control label."""
        if self.perturbation is None:
            return np.zeros(len(obs), dtype=bool)
        control: np.ndarray = (self._labels(obs, self.perturbation) == self.control).to_numpy()
        return control

    def names(self, obs: pd.DataFrame) -> pd.Series:
        """Name of the condition of each row: covariate values and perturbation (and dose, time) joined by ``|``."""
        table = self.tidy(obs)
        numbers = [column for column in (self.dose, self.time) if column is not None]
        for column in numbers:
            table[column] = table[column].map(_written)
        return _joined(table, self.columns)

    def groups(self, obs: pd.DataFrame) -> pd.Series:
        """Name of the covariate group of each row: covariate values joined by ``|``; ``all`` without covariates."""
        labels = {column: self._labels(obs, column) for column in self.covariates}
        return _joined(pd.DataFrame(labels, index=obs.index), list(self.covariates))

    def tidy(self, obs: pd.DataFrame) -> pd.DataFrame:
        """Only the columns of the Design: labels in canonical form, dose and time as numbers.

        Raises
        ------
        ValueError
            If a column is missing or holds missing values, a label holds ``|``, or a dose or time is no number >= 0.
        """
        columns = {}
        for column in self.columns:
            is_number = column in (self.dose, self.time)
            columns[column] = _numeric(obs, column) if is_number else self._labels(obs, column)
        return pd.DataFrame(columns, index=obs.index, columns=self.columns)

    def unique_conditions(self, obs: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
        """Distinct rows of :meth:`tidy` in order of appearance, and (n,) the position of each cell's row in them."""
        if not self.columns:
            return obs[self.columns].iloc[:1], np.zeros(len(obs), dtype=np.int32)
        table = self.tidy(obs)

        # refine the partition column by column; numbers stay below the number of rows, so that none overflows
        condition = np.zeros(len(obs), dtype=np.int64)
        for column in self.columns:
            codes, levels = pd.factorize(table[column])
            condition = pd.factorize(condition * len(levels) + codes)[0]
        is_first = ~pd.Series(condition).duplicated().to_numpy()
        return table[is_first], condition.astype(np.int32)

    def conditions(self, obs: pd.DataFrame, *, control: bool = False) -> pd.DataFrame:
        """Distinct conditions of obs, one row each, sorted by name; control conditions only if asked for."""
        table = self.tidy(obs).drop_duplicates()
        if not control:
            table = table[~self.is_control(table)]
        return table.sort_values(self.columns, ignore_index=True) if self.columns else table[:1].reset_index(drop=True)

    def encode(self, obs: pd.DataFrame) -> Condition:
        """Turn the labels of n rows into tensors.

        Raises
        ------
        ValueError
            As :meth:`tidy`, or if a perturbation or covariate label is not known to the Design.
        """
        table = self.tidy(obs)
        multi_hot = self._multi_hot(table)
        if self.dose is not None:
            # on a logarithmic scale, 1 at the largest dose seen
            dose = np.log1p(table[self.dose].to_numpy(np.float32)) / np.log1p(np.float32(self.dose_max))
            multi_hot = multi_hot * dose[:, None]
        covariates = {name: _codes(table[name], levels, self.unknown) for name, levels in self.covariates.items()}
        continuous = {}
        if self.time is not None:
            continuous[self.time] = torch.from_numpy(table[self.time].to_numpy(np.float32))
        features = None
        if self.features:  # of a combination: the sum over its perturbations
            features = torch.from_numpy(multi_hot @ np.array(self.features, np.float32))
        return Condition(torch.from_numpy(multi_hot), covariates, continuous, features)

    def with_levels(self, obs: pd.DataFrame) -> Self:
        """The same Design with the covariate levels of obs that are new to it, behind the known ones."""
        levels = {}
        for name, known in self.covariates.items():
            found = _levels(self._labels(obs, name), self.unknown)
            levels[name] = (*known, *sorted(set(found) - set(known)))
        return replace(self, covariates=levels)

    def _labels(self, obs: pd.DataFrame, column: str) -> pd.Series:
        """(n,) canonical labels of a column of the Design, as text; `unknown` where they are missing."""
        _check_column(obs, column, "design", missing=column in self.covariates and self.unknown is not None)
        # only distinct labels are parsed: a file has millions of cells and few labels
        codes, written = pd.factorize(obs[column])
        canonical = [str(self.value(column, label)) for label in written]
        barred = [label for label in canonical if "|" in label]
        if barred and len(self.columns) > 1:
            raise ValueError(
                f"obs[{column!r}] has labels with '|': {preview(barred)}; '|' joins labels in the names of conditions. "
                "Rename them, for example with .str.replace('|', '/')"
            )
        labels = np.array([*canonical, self.unknown], dtype=object)  # the code of a missing label is -1, the last one
        return pd.Series(labels[codes], index=obs.index)

    def _parts_in(self, table: pd.DataFrame) -> set[str]:
        """Names of the single perturbations of a tidy table, in which the control must occur."""
        if self.perturbation is None:
            return set()
        labels = sorted(table[self.perturbation].unique())
        if self.control not in labels:
            raise ValueError(
                f"control label {self.control!r} does not occur in obs[{self.perturbation!r}]; "
                f"found {with_likely(str(self.control), labels)}. Pass the label of the unperturbed cells as control="
            )
        return {part for label in labels for part in self.parts(label)}

    def _multi_hot(self, table: pd.DataFrame) -> np.ndarray:
        """(n, p) single perturbations of every row of a tidy table."""
        position = {name: i for i, name in enumerate(self.perturbations)}
        if self.perturbation is None:
            return np.zeros((len(table), 0), dtype=np.float32)
        codes, labels = pd.factorize(table[self.perturbation])
        # one row per distinct label, then one per cell
        rows = np.zeros((len(labels), len(position)), dtype=np.float32)
        for row, label in enumerate(labels):
            for part in self.parts(label):
                if part not in position:
                    raise ValueError(
                        f"perturbation {part!r} in obs[{self.perturbation!r}] is not known to this design; "
                        f"known: {preview(self.perturbations)} and the control {self.control!r}"
                    )
                rows[row, position[part]] = 1.0
        multi_hot: np.ndarray = rows[codes]
        return multi_hot

    def shown(self) -> Rows:
        """What it shows of itself."""
        rows = []
        if self.perturbation is not None:
            rows = [("perturbation", f"{self.perturbation}, control {self.control!r}")]
            rows += [("perturbations", preview(self.perturbations))]
        rows += [(name, preview(levels)) for name, levels in self.covariates.items()]
        further = {"dose": self.dose, "time": self.time, "batch": self.batch}
        rows += [(role, column) for role, column in further.items() if column]
        if self.features:
            rows.append(("features", f"{self.code_width:,} numbers for each perturbation"))
        return rows or [("columns", "none")]

    def to_json(self) -> str:
        """Write as JSON; :meth:`from_json` reads it back."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote."""
        fields = json.loads(text)
        fields["perturbations"] = tuple(fields["perturbations"])
        fields["features"] = tuple(map(tuple, fields.get("features", ())))
        fields["covariates"] = {name: tuple(levels) for name, levels in fields["covariates"].items()}
        return cls(**fields)


def _vectors(features: pd.DataFrame, parts: set[str]) -> dict[str, tuple[float, ...]]:
    """Name of every perturbation of the table to its vector."""
    names = features.index.astype(str)
    if not names.is_unique:
        raise ValueError(f"features: perturbations named more than once: {preview(names[names.duplicated()].unique())}")
    if lacking := sorted(parts - set(names)):
        raise ValueError(
            f"features lack {len(lacking)} of the {len(parts)} perturbations: {preview(lacking)}; found "
            f"{preview(names)}. "
            "Add a row for each, or remove the cells"
        )
    # text becomes NaN, and is refused
    values = features.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("features must hold finite numbers, one column or more; found none, text or missing values")
    return dict(zip(names, map(tuple, values.tolist()), strict=True))


def _split(label: str, separator: str) -> set[str]:
    """Parts of a label, without the space around them."""
    parts = {part.strip() for part in label.split(separator)} if separator else {label}
    if "" in parts:
        raise ValueError(
            f"perturbation label {label!r} has an empty part around the separator {separator!r}; "
            "rename the label or pass another separator="
        )
    return parts


def _joined(table: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Columns of text as one, joined by ``|``; ``all`` if there are none."""
    if not columns:
        return pd.Series("all", index=table.index)
    first, *others = [table[column] for column in columns]
    return first.str.cat(others, sep="|") if others else first


def _levels(labels: pd.Series, unknown: str | None) -> tuple[str, ...]:
    """Known labels of a covariate, sorted by name."""
    levels = sorted(set(labels) - {unknown})
    if not levels:
        raise ValueError(f"covariate obs[{labels.name!r}] has no known label; leave it out")
    return tuple(levels)


def _codes(labels: pd.Series, levels: Sequence[str], unknown: str | None) -> torch.Tensor:
    """Number of the level of each row, -1 where it is not known."""
    codes = pd.Categorical(labels, categories=list(levels)).codes
    unseen = sorted(set(labels[codes < 0]) - {unknown})
    if unseen:
        raise ValueError(
            f"covariate obs[{labels.name!r}] has labels that are not known to this design: {preview(unseen)}; "
            f"known: {preview(levels)}"
        )
    return torch.from_numpy(codes.astype(np.int64))


def _numeric(obs: pd.DataFrame, column: str) -> pd.Series:
    """(n,) float64 values of a column of doses or times."""
    _check_column(obs, column, "design")
    # to float64 by way of what is written
    written = obs[column]
    if isinstance(written.dtype, pd.CategoricalDtype):
        written = written.astype(written.cat.categories.dtype)
    if written.dtype in (np.float16, np.float32):
        written = written.astype(str)  # .1 in single precision means .1, not .10000000149
    values = pd.to_numeric(written.astype(object), errors="coerce").astype(float)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        raise ValueError(f"obs[{column!r}] must hold finite numbers >= 0; found {preview(obs[column][wrong].unique())}")
    return values


def _written(value: float) -> str:
    """A number in six digits, or in all that it takes to read the same number back."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _check_column(obs: pd.DataFrame, column: str, role: str, *, missing: bool = False) -> None:
    advice = " (or, for covariates, give the Design unknown=, the label to read them as)"
    require_column(obs, column, role, allow_missing=missing, advice=advice)
