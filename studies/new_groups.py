"""PRiMeFlow on donors of whom nothing is known but control cells, and these only when it predicts.

    python benchmarks/new_groups.py --data-dir DATA

The task `kang-donor`, without any cell of the test donors in Design and fit; their training controls go to `predict`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

import invirtuo as iv
from invirtuo.bench import TASKS
from invirtuo.metrics import Pair, score

METRICS = ("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean", "variance_ratio")


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit without the donors, predict them, print means over conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adata, whole, split = replace(TASKS["kang-donor"], n_genes=500).load(data_dir=args.data_dir)
    held_out = whole.conditions(adata.obs[(split == "test").to_numpy()])
    new = adata.obs["donor"].isin(held_out["donor"]).to_numpy()
    columns = {"perturbation": whole.perturbation, "control": whole.control, "covariates": list(whole.covariates)}
    model = iv.models.PRiMeFlow(iv.Design.from_adata(adata[~new], **columns), adata.var_names)
    fit = replace(model.fit_config, steps=args.steps, seed=args.seed, progress=False)
    model.fit(adata[~new].copy(), split[~new], fit)
    known = adata[new & (split == "train").to_numpy()].copy()
    predicted = model.predict(held_out, 300, seed=args.seed, controls=known)
    scores = score(Pair(predicted, adata[(split == "test").to_numpy()].copy(), whole, n_pcs=30), METRICS)
    scores = scores[scores["condition"].isin(whole.names(pd.DataFrame(held_out)))]
    print(scores.groupby("metric")["value"].mean().reindex(METRICS).round(3).to_string())


if __name__ == "__main__":
    main()
