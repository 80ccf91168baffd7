"""Which conditions are asked of a fitted model."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import pandas as pd

from invirtuo.cells.conditions import Conditions, as_table
from invirtuo.design import Design
from invirtuo.errors import preview

__all__ = ["wanted_conditions"]


class Fitted(Protocol):
    """A fitted model, as far as it is needed here."""

    name: ClassVar[str]
    design: Design
    card: dict[str, Any]

    @property
    def takes_unseen(self) -> bool:
        """Whether perturbations that are not among the training cells can be predicted."""


def wanted_conditions(conditions: Conditions, model: Fitted) -> pd.DataFrame:
    """The wanted conditions as a tidy table, each once.

    Parameters
    ----------
    conditions
        Conditions in any form, or "test" / "val" for those that the fit held out.
    model
        A fitted model, which must know their labels.

    Raises
    ------
    ValueError
        If a label is unknown or was never seen in training, or the split held out no such conditions.
    """
    # "test" and "val" stand for what the split held out

    # a part of the split stands for the conditions that it held out
    if isinstance(conditions, str):
        held_out = model.card["held_out"]
        if conditions in held_out and not held_out[conditions]:
            raise ValueError(f"the split of the fit held out no conditions for {conditions!r}; name conditions")
        if conditions in held_out:
            conditions = pd.DataFrame(held_out[conditions])
        elif "|" not in conditions and len(model.design.columns) > 1:
            like = "|".join(model.design.columns)
            raise ValueError(
                f"conditions is {conditions!r}; expected a DataFrame or one of {', '.join(held_out)}, or {like!r}"
            )

    # perturbations of the design that no training cell had
    conditions = as_table(conditions, model.design)
    encoded = model.design.encode(conditions)  # raises for unknown labels and missing columns
    is_asked = (encoded.perturbation != 0).any(dim=0).tolist()
    asked = [name for name, flag in zip(model.design.perturbations, is_asked, strict=True) if flag]
    unseen = [name for name in asked if name not in model.card["perturbations"]]
    if unseen and not model.takes_unseen:
        raise ValueError(
            f"perturbation(s) {preview(unseen)} do not occur in the training cells of this model; "
            f"trained: {preview(model.card['perturbations'])}. Only models that take perturbation features "
            "(features= of Design.from_adata) predict others"
        )

    # covariates have no features: only levels that were trained on
    for name, levels in model.card["covariates"].items():
        unseen = sorted(set(conditions[name]) - set(levels))
        if unseen:
            raise ValueError(
                f"covariate {name!r}: {preview(unseen)} do not occur in the training cells; trained: {preview(levels)}"
            )
    return conditions
