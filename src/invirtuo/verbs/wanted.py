"""Which conditions are asked of a fitted model."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import pandas as pd

from invirtuo.cells.conditions import Conditions, as_table
from invirtuo.design import Design
from invirtuo.errors import preview

__all__ = ["wanted_conditions"]


class Fitted(Protocol):
    """What is asked of a model here."""

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
    conditions = as_table(conditions, model.design)
    encoded = model.design.encode(conditions)  # names unknown labels and missing columns
    unseen = [p for i, p in enumerate(model.design.perturbations) if p not in model.card["perturbations"]
              and bool((encoded.perturbation[:, i] != 0).any())]  # fmt: skip
    if unseen and not model.takes_unseen:
        raise ValueError(
            f"perturbation(s) {preview(unseen)} do not occur in the training cells of this model; "
            f"trained: {preview(model.card['perturbations'])}. Only models that take perturbation features "
            "(features= of Design.from_adata) predict others"
        )
    for name, levels in model.card["covariates"].items():
        strange = sorted(set(conditions[name]) - set(levels))
        if strange:
            raise ValueError(
                f"covariate {name!r}: {preview(strange)} do not occur in the training cells; trained: {preview(levels)}"
            )
    return conditions
