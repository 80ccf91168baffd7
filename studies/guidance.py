"""What weights of guidance do: probability that classifiers of real cells give to the labels that were asked for.

Kang, 3,000 genes, 70 % of the cells to learn from; attributes cell type, donor and condition, as in table 10 of CFGen.
Cells of a type under IFN-beta are drawn with weight 1 for the type and 0, 1, 2 for the condition (of no donor), and
cells of a donor and a type with weights 0, 1, 2 for the donor; "real" are real held-out cells of these labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import invirtuo as iv
from invirtuo.bench import label_probability
from studies.harness import Tables, filled, fit, study

TYPE, DONOR, CONDITION = "cell_type_coarse", "donor", "perturbation"
TYPES = ("CD14+ Monocytes", "CD4 T cells", "B cells", "NK cells")
WEIGHTS, N = (0.0, 1.0, 2.0, 3.0), 500


@study()
def guidance(*, out: Path, data_dir: str | None = None, seeds: int = 1) -> Tables:
    """How surely classifiers of real cells see the labels that CFGen was guided to."""
    adata = iv.datasets.load("kang_hvg3k", data_dir=data_dir)

    def one(seed: int) -> list[dict]:
        held_out = np.random.default_rng(seed).random(adata.n_obs) < 0.3
        train, real = adata[~held_out].copy(), adata[held_out].copy()
        design = iv.Design.from_adata(train, covariates=[TYPE, DONOR, CONDITION])
        model = fit(iv.models.CFGen(design, train.var_names), train, seed=seed)
        judge = label_probability(train, [TYPE, DONOR, CONDITION], seed=seed)
        return list(probabilities(model, real, judge, seed))

    table = filled(out / "probabilities.csv", one, seed=range(seeds))
    keys = ["attribute", "cell type"]
    return {"summary": table.pivot_table(index=keys, columns="weight", values=["type", "label"])}


def asked_for(real, column: str) -> list[tuple[str, str]]:
    """Types and labels of the other attribute to draw: stimulated cells, or every donor of the largest type."""
    if column == CONDITION:
        return [(kind, "IFN-beta") for kind in TYPES]
    return [(TYPES[0], donor) for donor in sorted(real.obs[DONOR].astype(str).unique())]


def probabilities(model, real, judge, seed: int):
    """A row for each pair of labels and weight, and one for real cells: mean probability of both labels."""
    for column in (CONDITION, DONOR):
        for kind, label in asked_for(real, column):
            same = ((real.obs[TYPE] == kind) & (real.obs[column].astype(str) == label)).to_numpy()
            sides = {"real": real[same]}
            for weight in WEIGHTS:
                where, guided = {TYPE: kind, column: label}, {TYPE: 1.0, column: weight}
                sides[f"{weight:g}"] = model.generate(N, where=where, guidance=guided, seed=seed)
            for weight, cells in sides.items():
                found = judge(cells)
                about = {"attribute": column, "cell type": kind, "asked for": label, "weight": weight}
                yield about | {"type": found[TYPE][kind].mean(), "label": found[column][label].mean()}
