"""Splits: pure functions that give every cell of obs to "train", "val" or "test".

Every function returns a text Series named ``split`` with the index of obs; an empty string marks a cell that belongs to
no part. The same obs and seed always give the same split, whatever the hash seed of the process.

`transfer`, `manual`, `combine` and `combine_inverse` are the tasks of PerturBench (Wu et al. 2024, arXiv:2408.10609)
and agree with its code cell by cell; `scaling` and `imbalanced` follow its rules on the amount and the balance of the
training data. `under_represented` and `zero_shot` are the tasks of STATE; `from_toml` reads the files in which its
public implementation writes splits down. `unseen_targets` holds out perturbations that are seen nowhere; `regimes` says
of every tested condition what of it was seen. `hold_out` is the plain choice when the wanted conditions are known.
Where nothing was perturbed, `cells` holds out cells at random, and `courses` time courses.

A control cell lies in one part, like any other cell: those in train are what a model learns from, those in test what
the effects of the test conditions are measured against. Hence a context whose controls are "available in training"
has a share of them there, not all.

``split.to_csv(path, header=False)`` writes the file that :func:`from_csv` reads.

Differs: covariate states are compared as tuples in column order, not as unordered sets of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from invirtuo.splits.cells import cells
from invirtuo.splits.contexts import hold_out, under_represented, zero_shot
from invirtuo.splits.courses import courses
from invirtuo.splits.file import from_csv
from invirtuo.splits.perturbench import combine, combine_inverse, imbalanced, manual, scaling, transfer
from invirtuo.splits.targets import regimes, unseen_targets
from invirtuo.splits.toml import from_toml

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SPLITS",
    "cells",
    "combine",
    "combine_inverse",
    "courses",
    "from_csv",
    "from_toml",
    "hold_out",
    "imbalanced",
    "manual",
    "regimes",
    "scaling",
    "transfer",
    "under_represented",
    "unseen_targets",
    "zero_shot",
]

SPLITS: dict[str, Callable[..., pd.Series]] = {
    "transfer": transfer,
    "manual": manual,
    "combine": combine,
    "combine_inverse": combine_inverse,
    "scaling": scaling,
    "imbalanced": imbalanced,
    "under_represented": under_represented,
    "zero_shot": zero_shot,
    "unseen_targets": unseen_targets,
    "hold_out": hold_out,
}
