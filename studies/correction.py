"""Correcting batches: scIB scores of CFGen by weights of guidance, beside uncorrected cells, scVI and scANVI.

    python benchmarks/correction.py --data-dir DATA --out correction

Kang, singlets, 3,000 genes, donors as batches, 13 cell types; all cells are learned from, some corrected and scored.
CFGen is told the types, as scANVI is, which flatters scores of biology. The collapse figure is the variance within
donors and types after over before. Needs the extras ``integration`` and, for the last two rows, ``scvi``. Embeddings
are kept in OUT and are not made again.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.bench import integration_scores
from invirtuo.bench.comparators import embeddings
from invirtuo.metrics.axes import principal_axes
from invirtuo.metrics.cells import per_10k

logger = logging.getLogger(__name__)

BATCH, LABEL = "donor", "cell_type"
WEIGHTS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3))  # of biology and batch, as in table 11


def uncorrected(adata, n_pcs: int = 50) -> np.ndarray:
    """(n, d) principal components of log1p of counts per 10,000."""
    logged = per_10k(adata.X)
    centre, axes = principal_axes(logged, n_pcs)
    return logged @ axes - centre @ axes


def corrected(adata, some, args, seconds: dict) -> dict[str, tuple[np.ndarray, float]]:
    """Latent vectors of CFGen, as they are and corrected by weights, and how much they have collapsed."""
    design = iv.Design.from_adata(adata, covariates=[LABEL, BATCH])
    model = iv.models.CFGen(design, adata.var_names)
    options = vars(model.fit_config) | {"seed": args.seed, "progress": False}
    started = time.process_time()
    model.fit(adata, config=iv.FitConfig(**options))
    seconds["cfgen fit"] = time.process_time() - started
    found = {"cfgen, not corrected": (model.embed(some).X, 1.0)}
    for bio, batch in WEIGHTS:
        started = time.process_time()
        new = model.correct(some, BATCH, guidance={LABEL: bio, BATCH: batch}, steps=args.steps, seed=args.seed)
        collapse = float(new.uns["invirtuo"]["collapse"])
        found[f"cfgen, weights {bio}, {batch}"] = (new.obsm["X_invirtuo"], collapse)
        seconds["cfgen correct"] = time.process_time() - started
    return found


def embedded(adata, rows, args) -> dict[str, tuple[np.ndarray, float]]:
    """Every embedding and its collapse figure, NaN where there is none; from the file if it is there."""
    path = args.out / "embeddings.npz"
    if path.exists():
        with np.load(path) as arrays:
            return {n: (arrays[n], float(arrays[f"{n}|collapse"])) for n in arrays.files if not n.endswith("|collapse")}
    seconds: dict[str, float] = {}
    found = {"uncorrected": (uncorrected(adata)[rows], 1.0)} | corrected(adata, adata[rows].copy(), args, seconds)
    started = time.process_time()
    try:
        others = embeddings(adata, BATCH, LABEL, epochs=args.epochs, seed=args.seed)
        found |= {name: (x[rows], np.nan) for name, x in others.items()}
        seconds["scvi and scanvi"] = time.process_time() - started
    except ValueError as error:
        logger.warning("scvi and scanvi are left out: %s", error)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {name: x for name, (x, _) in found.items()} | {f"{n}|collapse": c for n, (_, c) in found.items()}
    with iv.files.writing(path) as unfinished:
        np.savez(unfinished, **parts)
    pd.Series(seconds, name="seconds").rename_axis("step").round(1).to_csv(args.out / "costs.csv")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, correct, score; print a row for each embedding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("correction"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=5000, help="that are corrected and scored")
    parser.add_argument("--steps", type=int, default=15, help="of the midpoint rule, each way")
    parser.add_argument("--epochs", type=int, default=30, help="of scVI; its own rule would take 400")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adata = iv.datasets.load("kang_hvg3k", data_dir=args.data_dir)
    adata = adata[(adata.obs["demuxlet_call"] == "SNG").to_numpy()].copy()
    rows = np.sort(np.random.default_rng(args.seed).permutation(adata.n_obs)[: args.cells])
    found = embedded(adata, rows, args)
    batch, label = (adata.obs[name].astype(str).to_numpy()[rows] for name in (BATCH, LABEL))
    scores = integration_scores({n: x for n, (x, _) in found.items()}, found["uncorrected"][0], batch, label)
    scores.round(4).to_csv(args.out / "scores.csv", index=False)
    table = scores[scores["metric"] == "mean"].pivot(index="model", columns="kind", values="value").loc[[*found]]
    table["collapse"] = [collapse for _, collapse in found.values()]
    table.round(4).to_csv(args.out / "summary.csv")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
