"""Splits written in the TOML files that train STATE's public implementation."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.splits.contexts import Fractions, deal_controls
from invirtuo.splits.parts import labels_and_states

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["from_toml"]

logger = logging.getLogger(__name__)

SECTIONS = ("datasets", "training", "zeroshot", "fewshot")
HELD_OUT = ("val", "test")

Content: TypeAlias = dict[str, dict[str, Any]]  # section to its lines


def from_toml(
    path: str | Path,
    obs: pd.DataFrame,
    design: Design,
    *,
    dataset: str | None = None,
    context: str | None = None,
    seed: int = 0,
    control_fractions: Fractions = (0.5, 0.25, 0.25),
) -> pd.Series:
    """Read a split from a TOML file with the sections datasets, training, zeroshot and fewshot.

    ``[training]`` lists data sets that train; in ``[zeroshot]`` a line ``"data set.context" = "test"`` (or "val") holds
    out every perturbation of a context, and a table ``[fewshot."data set.context"]`` the perturbations in its lists
    `val` and `test`; a perturbation in both is test. All else trains. Cells of data sets that are not in ``[training]``
    are unassigned, but for the contexts that are named. The paths under ``[datasets]`` are not read.

    Parameters
    ----------
    path
        The file.
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    dataset
        Which data set of the file obs is, or the column of obs that says so for each cell; None if the file has one.
    context
        The covariate that holds the contexts; None if the design has one covariate.
    seed
        Seed of the division of the controls.
    control_fractions
        Shares of train, val and test among the controls of each group; they must sum to 1.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".

    Raises
    ------
    ValueError
        If the file is missing, is no TOML, has other sections, or names a data set, context or perturbation that obs
        does not have.
    """
    labels = labels_and_states(obs, design)["label"].to_numpy()
    content = _read(path)
    names = _datasets(content, obs, dataset, path)
    contexts = design.tidy(obs)[_context(design, context)].to_numpy()
    control = design.is_control(obs)

    # all cells of the training data sets train, unless a context says otherwise
    training = [name for name, value in content["training"].items() if _is_part(value, ("train",), name, path)]
    split = pd.Series(np.where(np.isin(names, training), "train", ""), index=obs.index, name="split", dtype=object)
    named = np.zeros(len(obs), dtype=bool)

    # a context that is held out as a whole
    for key, part in content["zeroshot"].items():
        inside = _inside(key, names, contexts, content, path)
        _is_part(part, HELD_OUT, key, path)
        split[inside], named = part, named | inside

    # a context of which the listed perturbations are held out
    for key, table in content["fewshot"].items():
        inside = _inside(key, names, contexts, content, path)
        if (named & inside).any():
            raise ValueError(f"{path}: {key} stands in zeroshot and in fewshot; name each context once")
        split[inside], named = "train", named | inside
        for part, listed in _lists(table, key, path).items():
            wanted = [design.label(label) for label in listed]
            present = set(labels[inside & ~control])
            if unknown := sorted(set(wanted) - present):
                raise ValueError(
                    f"{path}: fewshot {key} {part} names perturbations that this context does not have: "
                    f"{preview(unknown)}; found {preview(sorted(present))}"
                )
            split[inside & np.isin(labels, wanted) & ~control] = part
    _check_left(split, control, path)

    # controls are divided anew, in whatever part their context is; unassigned ones stay out
    is_assigned = (split != "").to_numpy()
    assigned = split[is_assigned].copy()
    deal_controls(assigned, design, obs[is_assigned], control_fractions, None, seed)
    split[is_assigned] = assigned
    return split


def _read(path: str | Path) -> Content:
    """The sections of the file, all of them there."""
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; expected a TOML file with {preview(SECTIONS)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    # all sections are tables, and there is something to train on
    unknown = sorted(set(content) - set(SECTIONS))
    wrong = [name for name, section in content.items() if not isinstance(section, Mapping)]
    if unknown or wrong:
        raise ValueError(f"{path}: expected the tables {preview(SECTIONS)}; found {preview(content)}")
    if not content.get("datasets") or not (content.get("training") or content.get("fewshot")):
        raise ValueError(f"{path}: expected data sets under [datasets] and [training]; found {preview(content)}")
    return {name: content.get(name, {}) for name in SECTIONS}


def _datasets(content: Content, obs: pd.DataFrame, dataset: str | None, path: str | Path) -> np.ndarray:
    """(n,), name of the data set of each cell."""
    known = list(content["datasets"])
    lost = sorted(set(content["training"]) - set(known))
    if lost:
        raise ValueError(f"{path}: [training] names {preview(lost)}, not in [datasets]: {preview(known)}")
    if dataset is None and len(known) > 1:
        raise ValueError(
            f"{path} has {len(known)} data sets: {preview(known)}; say with dataset= which one obs is, or in which "
            "column of obs their names stand"
        )

    # one data set for all cells, or a column that says which
    if dataset is None or dataset in known:
        return np.full(len(obs), dataset or known[0], dtype=object)
    if dataset not in obs.columns:
        raise ValueError(f"dataset {dataset!r} is neither in {path} ({preview(known)}) nor a column of obs")
    names: np.ndarray = obs[dataset].astype(str).to_numpy(dtype=object)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(
            f"obs[{dataset!r}] holds {preview(unknown)}, which {path} does not name; it has {preview(known)}"
        )
    return names


def _context(design: Design, context: str | None) -> str:
    covariates = list(design.covariates)
    if context is None and len(covariates) == 1:
        return covariates[0]
    if context not in covariates:
        raise ValueError(
            f"context is {context!r}; expected the covariate that holds the contexts: {preview(covariates)}"
        )
    return context


def _inside(key: str, names: np.ndarray, contexts: np.ndarray, content: Content, path: str | Path) -> np.ndarray:
    """(n,) bool, the cells of "data set.context"; nothing if obs has other data sets only."""
    known = [name for name in content["datasets"] if key.startswith(f"{name}.")]
    if not known:
        raise ValueError(
            f'{path}: {key!r} is not "data set.context", in quotes, of a data set in [datasets]: '
            f"{preview(content['datasets'])}"
        )
    name = max(known, key=len)  # names may hold dots
    context = key[len(name) + 1 :].strip()
    in_dataset = names == name
    inside: np.ndarray = in_dataset & (contexts == context)
    if in_dataset.any() and not inside.any():
        found = sorted(set(contexts[in_dataset]))
        raise ValueError(f"{path}: {name} has no cells of context {context!r}; found {preview(found)}")
    return inside


def _is_part(value: Any, allowed: Sequence[str], key: str, path: str | Path) -> bool:
    if value not in allowed:
        raise ValueError(f"{path}: {key} is {value!r}; expected {' or '.join(map(repr, allowed))}")
    return True


def _lists(table: Any, key: str, path: str | Path) -> dict[str, list[str]]:
    """Perturbations to validate and to test on, test last so that it wins."""
    if not isinstance(table, Mapping) or set(table) - set(HELD_OUT):
        raise ValueError(f"{path}: fewshot {key} must hold lists named val and test; found {table!r}")
    lists = {}
    for part in HELD_OUT:
        lists[part] = [str(label) for label in table.get(part, [])]
    both = sorted(set(lists["val"]) & set(lists["test"]))
    if both:
        logger.warning("%s: %s are val and test in %s; they are taken as test", path, preview(both), key)
    return lists


def _check_left(split: pd.Series, control: np.ndarray, path: str | Path) -> None:
    """There must be perturbed cells to train on, and perturbed cells held out."""
    found = sorted(set(split[~control]) - {""})
    if "train" not in found or not set(found) & set(HELD_OUT):
        parts = preview(found) if found else "nothing"
        raise ValueError(f"{path} leaves perturbed cells for {parts}; expected some to train on and some held out")
