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
from invirtuo.checks import some

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Design"]


@dataclass(frozen=True)
class Design:
    """Column roles and levels of an experiment.

    Made by :meth:`from_adata`; the levels are sorted by name, so that the same labels always give the same tensors.

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
        A vector for every single perturbation, (p, f), or empty. Networks then see vectors in place of one-hots, and
        can be asked for perturbations that were never trained on.

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
    features: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def from_adata(
        cls,
        adata: AnnData | pd.DataFrame,
        *,
        perturbation: str | None = None,
        control: str | None = None,
        covariates: Sequence[str] | str = (),
        dose: str | None = None,
        time: str | None = None,
        separator: str = "+",
        unknown: str | None = None,
        features: pd.DataFrame | None = None,
    ) -> Self:
        """Read roles and levels from the obs of an AnnData (or from a DataFrame like it).

        Parameters
        ----------
        adata, perturbation, control, covariates, dose, time, separator, unknown
            See :class:`Design`.
        features
            A row of numbers for each perturbation, named by the index. Rows for perturbations that do not occur make
            these known as well. Networks see the numbers as they are: bring the columns to a scale of about 1.

        Raises
        ------
        ValueError
            If a column is missing, holds missing values or has two roles, the control label does not occur or is given
            without its column, a dose is negative, or the features lack a perturbation.
        """
        obs = adata if isinstance(adata, pd.DataFrame) else adata.obs
        covariates = [covariates] if isinstance(covariates, str) else list(covariates)
        if (perturbation is None) != (control is None):
            raise ValueError(
                f"perturbation is {perturbation!r} and control is {control!r}; give both, or neither for data in which "
                "nothing was perturbed"
            )
        named = {"perturbation": perturbation, "dose": dose, "time": time}
        roles = [(role, column) for role, column in named.items() if column is not None]
        roles += [("covariates", name) for name in covariates]
        for role, column in roles:
            _check_column(obs, column, role, missing=role == "covariates" and unknown is not None)
        if repeated := [column for column, n in Counter(column for _, column in roles).items() if n > 1]:
            raise ValueError(f"column(s) {some(repeated)} have more than one role; name each column once")
        parts = set() if perturbation is None else _parts(obs, perturbation, control, separator)
        vectors = {} if features is None else _vectors(features, parts)
        dose_max = float(_numeric(obs, dose).max()) if dose else 1.0
        if time:
            _numeric(obs, time)
        return cls(
            perturbation=perturbation,
            control=control,
            perturbations=tuple(sorted(vectors or parts)),
            covariates={name: _levels(obs, name, unknown) for name in covariates},
            dose=dose,
            dose_max=dose_max if dose_max > 0 else 1.0,
            time=time,
            separator=separator,
            unknown=unknown,
            features=tuple(vectors[part] for part in sorted(vectors)),
        )

    @property
    def code_width(self) -> int:
        """Length of what a network is told of the perturbations: f with features, else p."""
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
        """Single perturbations of a label, sorted, each once; () for the control."""
        return _split(label, self.separator, self.control)

    def is_control(self, obs: pd.DataFrame) -> np.ndarray:
        """(n,) bool, True for cells that carry the control label."""
        if self.perturbation is None:
            return np.zeros(len(obs), dtype=bool)
        return np.asarray(_labels(obs, self.perturbation) == self.control)

    def names(self, obs: pd.DataFrame) -> pd.Series:
        """Name of the condition of each row: covariate values and perturbation (and dose, time) joined by ``|``."""
        if not self.columns:
            return pd.Series("all", index=obs.index)
        table = self.tidy(obs)
        columns = [table[c].map("{:g}".format) if c in (self.dose, self.time) else table[c] for c in self.columns]
        return columns[0].str.cat(columns[1:], sep="|") if len(columns) > 1 else columns[0]

    def tidy(self, obs: pd.DataFrame) -> pd.DataFrame:
        """Only the columns of the Design: labels as text, dose and time as numbers, whatever their types in obs."""
        numbers = {column: _numeric(obs, column) for column in (self.dose, self.time) if column is not None}
        texts = {c: _text(obs, c, self.unknown) for c in self.attributes}
        return pd.DataFrame({c: numbers[c] if c in numbers else texts[c] for c in self.columns}, index=obs.index)

    def groups(self, obs: pd.DataFrame) -> pd.Series:
        """Name of the covariate group of each row: covariate values joined by ``|``; ``all`` without covariates."""
        if not self.covariates:
            return pd.Series("all", index=obs.index)
        columns = [_text(obs, column, self.unknown) for column in self.covariates]
        return columns[0].str.cat(columns[1:], sep="|") if len(columns) > 1 else columns[0]

    def kinds(self, obs: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
        """Rows of obs that differ in the columns of the Design, and (n,) the number of each row's among them."""
        for column in self.columns:
            _check_column(obs, column, "conditions", missing=True)
        if not self.columns:
            return obs[self.columns].iloc[:1], np.zeros(len(obs), dtype=np.int32)
        numbers = [pd.factorize(obs[column], use_na_sentinel=False) for column in self.columns]
        kind = np.zeros(len(obs), dtype=np.int64)
        for codes, levels in numbers:
            kind = pd.factorize(kind * len(levels) + codes)[0]
        first = np.flatnonzero(~pd.Series(kind).duplicated().to_numpy())
        return obs[self.columns].iloc[first], kind.astype(np.int32)

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
            If a column is missing, or a perturbation or covariate label is not known to the Design.
        """
        for column in self.columns:
            _check_column(obs, column, "conditions", missing=column in self.covariates and self.unknown is not None)
        multi_hot = self._multi_hot(obs)
        if self.dose is not None:
            dose = np.log1p(_numeric(obs, self.dose).to_numpy(np.float32)) / np.log1p(np.float32(self.dose_max))
            multi_hot = multi_hot * dose[:, None]
        covariates = {name: _codes(obs, name, levels, self.unknown) for name, levels in self.covariates.items()}
        continuous = {self.time: torch.from_numpy(_numeric(obs, self.time).to_numpy(np.float32))} if self.time else {}
        features = torch.from_numpy(multi_hot @ np.array(self.features, np.float32)) if self.features else None
        return Condition(torch.from_numpy(multi_hot), covariates, continuous, features)

    def with_levels(self, obs: pd.DataFrame) -> Self:
        """The same Design with the covariate levels of obs that are new to it, behind the known ones."""
        for name in self.covariates:
            _check_column(obs, name, "covariates", missing=self.unknown is not None)
        found = {name: _levels(obs, name, self.unknown) for name in self.covariates}
        levels = {name: (*known, *sorted(set(found[name]) - set(known))) for name, known in self.covariates.items()}
        return replace(self, covariates=levels)

    def _multi_hot(self, obs: pd.DataFrame) -> np.ndarray:
        """(n, p) single perturbations of every row."""
        if self.perturbation is None:
            return np.zeros((len(obs), 0), dtype=np.float32)
        labels = _labels(obs, self.perturbation)
        position = {name: i for i, name in enumerate(self.perturbations)}
        table = np.zeros((len(labels.cat.categories), len(position)), dtype=np.float32)
        for row, label in enumerate(labels.cat.categories):
            for part in self.parts(label):
                if part not in position:
                    raise ValueError(
                        f"perturbation {part!r} in obs[{self.perturbation!r}] is not known to this design; "
                        f"known: {some(self.perturbations)} and the control {self.control!r}"
                    )
                table[row, position[part]] = 1.0
        return table[labels.cat.codes.to_numpy()]

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


def _parts(obs: pd.DataFrame, perturbation: str, control: str | None, separator: str) -> set[str]:
    """Names of the single perturbations in obs; the control label must occur."""
    labels = _labels(obs, perturbation)
    if control not in labels.cat.categories:
        raise ValueError(
            f"control label {control!r} does not occur in obs[{perturbation!r}]; "
            f"found {some(labels.cat.categories)}. Pass the label of the unperturbed cells as control="
        )
    return {part for label in labels.cat.categories for part in _split(label, separator, control)}


def _vectors(features: pd.DataFrame, parts: set[str]) -> dict[str, tuple[float, ...]]:
    """Name of every perturbation of the table to its vector."""
    names = features.index.astype(str)
    if not names.is_unique:
        raise ValueError(f"features: perturbations named more than once: {some(names[names.duplicated()].unique())}")
    if lacking := sorted(parts - set(names)):
        raise ValueError(
            f"features lack {len(lacking)} of the {len(parts)} perturbations: {some(lacking)}; found {some(names)}. "
            "Add a row for each, or remove the cells"
        )
    values = features.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("features must hold finite numbers, one column or more; found none, text or missing values")
    return dict(zip(names, map(tuple, values.tolist()), strict=True))


def _split(label: str, separator: str, control: str | None) -> tuple[str, ...]:
    """Parts of a label, the control removed ("A+control" is A alone)."""
    if label == control:
        return ()
    parts = {part.strip() for part in label.split(separator)} if separator else {label}
    if "" in parts:
        raise ValueError(
            f"perturbation label {label!r} has an empty part around the separator {separator!r}; "
            "rename the label or pass another separator="
        )
    return tuple(sorted(parts - {control}))


def _labels(obs: pd.DataFrame, column: str) -> pd.Series:
    """The column as text categories, unused ones removed."""
    return obs[column].astype(str).astype("category")


def _text(obs: pd.DataFrame, column: str, unknown: str | None) -> pd.Series:
    """The column as text, missing values as the label that stands for them."""
    text = obs[column].astype(str)
    return text if unknown is None else text.mask(obs[column].isna(), unknown)


def _levels(obs: pd.DataFrame, column: str, unknown: str | None) -> tuple[str, ...]:
    levels = sorted(set(_text(obs, column, unknown)) - {unknown})
    if not levels:
        raise ValueError(f"covariate obs[{column!r}] has no known label; leave it out")
    return tuple(levels)


def _codes(obs: pd.DataFrame, column: str, levels: Sequence[str], unknown: str | None) -> torch.Tensor:
    """Number of the level of each row, -1 where it is not known."""
    text = _text(obs, column, unknown)
    codes = pd.Categorical(text, categories=list(levels)).codes
    strange = sorted(set(text[codes < 0]) - {unknown})
    if strange:
        raise ValueError(
            f"covariate obs[{column!r}] has labels that are not known to this design: {some(strange)}; "
            f"known: {some(levels)}"
        )
    return torch.from_numpy(codes.astype(np.int64))


def _numeric(obs: pd.DataFrame, column: str) -> pd.Series:
    values = pd.to_numeric(obs[column].astype(object), errors="coerce").astype(float)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"obs[{column!r}] must hold finite numbers >= 0; found {some(obs[column].unique())}")
    return values


def _check_column(obs: pd.DataFrame, column: str, role: str, *, missing: bool = False) -> None:
    if column not in obs.columns:
        raise ValueError(f"{role}: column {column!r} is not in the table; found {some(obs.columns)}")
    if not missing and obs[column].isna().any():
        raise ValueError(
            f"{role}: column {column!r} has {int(obs[column].isna().sum())} missing values; "
            "remove these cells or label them (or, for covariates, give the Design unknown=, the label to read them as)"
        )
