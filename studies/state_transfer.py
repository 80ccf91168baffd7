"""ST trained first on one data set, then on another: what fine-tuning is worth at few steps.

First Kang (IFN-beta, blood cells), then the response of glioblastomas to panobinostat with a patient held out, on the
genes that both have. From the weights of the first and from scratch, with the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from invirtuo.bench import TASKS
from invirtuo.metrics import Pair
from invirtuo.models.state.state_transition import StateTransition
from studies.harness import Tables, filled, fit, mean_scores, part, study

METRICS = ("mmd_gex", "deg_recall", "cosine_logfc", "pearson_delta", "rmse_mean", "variance_ratio")


@study(quick={"folds": 1, "first_steps": 1, "steps": [1]})
def state_transfer(
    *,
    out: Path,
    data_dir: str | None = None,
    folds: int = 5,
    seeds: int = 1,
    first_steps: int = 500,
    steps: Sequence[int] = (50, 200),
) -> Tables:
    """ST fine-tuned from another data set, beside ST from scratch.

    Parameters
    ----------
    folds
        Patients held out, one at a time.
    first_steps
        Training steps on the first data set.
    steps
        Numbers of training steps on the second.
    """
    first, first_design, first_split = replace(TASKS["kang-donor"], n_genes=None).load(data_dir=data_dir)
    known = set(first.var_names)

    @cache
    def second(fold: int):
        adata, design, split = TASKS["glioblastoma-donor"].load(fold, data_dir=data_dir)
        return adata[:, [gene in known for gene in adata.var_names]].copy(), design, split

    @cache
    def trained(seed: int) -> StateTransition:
        genes = second(0)[0].var_names
        model = StateTransition(first_design, genes)
        return fit(model, first[:, genes].copy(), first_split, steps=first_steps, seed=seed, val_every=0)

    def one(start: str, steps: int, fold: int, seed: int) -> dict:
        adata, design, split = second(fold)
        if start == "scratch":
            model = StateTransition(design, adata.var_names)
        else:
            model = trained(seed).adapt(design, adata.var_names)
        config = StateTransition(design, adata.var_names).fit_config
        model.fit(adata, split, replace(config, steps=steps, seed=seed, progress=False, val_every=0))
        predicted = model.predict("test", 300, seed=seed)
        return mean_scores(Pair(predicted, part(adata, split, "test"), design, n_pcs=30), METRICS)

    axes = {"seed": range(seeds), "fold": range(folds), "steps": steps, "start": ("scratch", "fine-tuned")}
    table = filled(out / "transfer.csv", one, **axes)
    return {"summary": table.groupby(["steps", "start"])[list(METRICS)].mean()}
