"""What weights of guidance do: probability that classifiers of real cells give to the labels that were asked for.

    python benchmarks/guidance.py --data-dir DATA --out guidance

Kang, 3,000 genes, 70 % of the cells to learn from; attributes cell type, donor and condition, as in table 10 of CFGen.
Cells of a type under IFN-beta are drawn with weight 1 for the type and 0, 1, 2 for the condition (of no donor), and
cells of a donor and a type with weights 0, 1, 2 for the donor; "real" are real held-out cells of these labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.bench import label_probability

TYPE, DONOR, CONDITION = "cell_type_coarse", "donor", "perturbation"
TYPES = ("CD14+ Monocytes", "CD4 T cells", "B cells", "NK cells")
WEIGHTS, N = (0.0, 1.0, 2.0, 3.0), 500


def asked_for(real, column: str) -> list[tuple[str, str]]:
    """Types and labels of the other attribute to draw: stimulated cells, or every donor of the largest type."""
    if column == CONDITION:
        return [(kind, "IFN-beta") for kind in TYPES]
    return [(TYPES[0], donor) for donor in sorted(real.obs[DONOR].astype(str).unique())]


def probabilities(cells, judge, kind: str, column: str, label: str) -> dict[str, float]:
    """Mean probability of the type and of the other label."""
    found = judge(cells)
    return {"type": found[TYPE][kind].mean(), "label": found[column][label].mean()}


def rows(model, real, judge, seed: int):
    """A row for each pair of labels and weight, and one for real cells."""
    for column in (CONDITION, DONOR):
        for kind, label in asked_for(real, column):
            about = {"attribute": column, "cell type": kind, "asked for": label}
            same = ((real.obs[TYPE] == kind) & (real.obs[column].astype(str) == label)).to_numpy()
            yield about | {"weight": "real"} | probabilities(real[same], judge, kind, column, label)
            for weight in WEIGHTS:
                made = model.generate(
                    N, where={TYPE: kind, column: label}, guidance={TYPE: 1.0, column: weight}, seed=seed
                )
                yield about | {"weight": f"{weight:g}"} | probabilities(made, judge, kind, column, label)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, train classifiers, generate, print mean probabilities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("guidance"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adata = iv.datasets.load("kang_hvg3k", data_dir=args.data_dir)
    held_out = np.random.default_rng(args.seed).random(adata.n_obs) < 0.3
    train, real = adata[~held_out].copy(), adata[held_out].copy()
    design = iv.Design.from_adata(train, covariates=[TYPE, DONOR, CONDITION])
    model = iv.models.CFGen(design, train.var_names)
    options = vars(model.fit_config) | {"seed": args.seed, "progress": False}
    model.fit(train, config=iv.FitConfig(**options))
    judge = label_probability(train, [TYPE, DONOR, CONDITION], seed=args.seed)
    table = pd.DataFrame([*rows(model, real, judge, args.seed)])
    args.out.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(args.out / "probabilities.csv", index=False)
    keys = ["attribute", "cell type"]
    print(table.pivot_table(index=keys, columns="weight", values=["type", "label"]).round(2).to_string())


if __name__ == "__main__":
    main()
