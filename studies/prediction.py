"""What predictions of PRiMeFlow promise and what guidance does to them, on conditions that were never seen.

    python benchmarks/prediction.py effects  --data-dir DATA --out prediction --seeds 3
    python benchmarks/prediction.py guidance --data-dir DATA --out prediction --seeds 3

`effects`: intervals are made to cover a share of all genes' effects, calibrated on the validation conditions of a task;
how many do they cover on its test conditions, and how wide are they, for each model and for all seeds taken together?

`guidance`: weights of classifier-free guidance, each acting all the time, early, in the middle or late.

Models are fitted once and kept in OUT/models, tables are written to OUT.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.bench import TASKS, effects
from invirtuo.metrics import Pair, score
from invirtuo.report.effects import coverage

METRICS = ("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean", "variance_ratio")
MODELS = {"primeflow": None, "perturbation_mean": "shift-cells"}
LARGEST = 50  # predicted effects of a condition that are looked at by themselves
LEVELS = (0.5, 0.8, 0.9, 0.95)
WEIGHTS = (1.0, 1.5, 2.0, 3.0)
WINDOWS = ((0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0))


def fitted(name: str, args: argparse.Namespace) -> Iterator[tuple]:
    """A task's cells and models: for each seed, the model of each kind."""
    task = TASKS[name]
    task = replace(task, n_genes=task.n_genes and min(task.n_genes, 500))
    adata, design, split = task.load(0, data_dir=args.data_dir)
    for kind, preset in MODELS.items():
        models = []
        for seed in range(args.seeds):
            folder = args.out / "models" / name / kind / str(seed)
            if not (folder / "config.json").exists():
                model = iv.models.MODELS[kind](design, adata.var_names, preset)
                fit = replace(model.fit_config, steps=args.steps, seed=seed, progress=False)
                model.fit(adata, split, fit).save(folder)
            models.append(iv.load(folder))
        yield kind, models, adata, design, split


def of_effects(name: str, args: argparse.Namespace) -> pd.DataFrame:
    """Coverage and width of the intervals on test conditions."""
    rows = []
    for kind, models, adata, _, _ in fitted(name, args):
        groups = {str(seed): [model] for seed, model in enumerate(models)} | {"together": models}
        for seed, group in groups.items():
            for level in LEVELS:
                table = effects(group, adata, level=level, n_cells=args.cells)
                row = {"task": name, "model": kind, "seed": seed, "level": level}
                rank = table["effect"].abs().groupby(table["condition"]).rank(ascending=False)
                for genes, part in (("all", table), ("large", table[rank <= LARGEST])):
                    size = part["effect"].abs().mean()
                    row |= {
                        f"covered, {genes}": coverage(part),
                        f"half-width, {genes}": (part["high"] - part["low"]).mean() / 2,
                    }
                    row |= {f"error, {genes}": (part["effect"] - part["real"]).abs().mean(), f"effect, {genes}": size}
                rows.append(row)
                print({k: v if isinstance(v, str) else round(v, 3) for k, v in row.items()}, flush=True)
    return pd.DataFrame(rows)


def of_guidance(name: str, args: argparse.Namespace) -> pd.DataFrame:
    """Scores of every weight and window."""
    rows = []
    _, models, adata, design, split = next(fitted(name, args))
    real, pair = adata[(split == "test").to_numpy()].copy(), None
    for seed, model in enumerate(models):
        for weight in WEIGHTS:
            for window in WINDOWS if weight != 1 else WINDOWS[:1]:
                cells = model.predict("test", args.cells, guidance=weight, interval=window, seed=seed)
                pair = Pair(cells, real, design, n_pcs=30) if pair is None else pair.against(cells)
                scores = score(pair, METRICS)
                scores = scores[scores["condition"].isin(design.names(cells.obs).unique())]
                row = {"task": name, "seed": seed, "weight": weight, "from": window[0], "to": window[1]}
                rows.append(row | scores.groupby("metric")["value"].mean().to_dict())
                print({k: v if isinstance(v, str) else round(v, 3) for k, v in rows[-1].items()}, flush=True)
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit what is missing, measure, write one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["effects", "guidance"])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("prediction"))
    parser.add_argument("--tasks", nargs="*", default=["kang-celltype", "kang-donor", "papalexi-replicate"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--cells", type=int, default=300, help="cells of each condition")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measure, keys = (
        (of_effects, ["task", "model", "level"]) if args.what == "effects" else
        (of_guidance, ["task", "weight", "from", "to"])
    )  # fmt: skip
    table = pd.concat([measure(name, args) for name in args.tasks], ignore_index=True)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / f"{args.what}.csv", index=False)
    table["seed"] = np.where(table["seed"].astype(str) == "together", "together", "alone")
    print(table.groupby([*keys, "seed"]).mean(numeric_only=True).round(3).to_string())


if __name__ == "__main__":
    main()
