"""PRiMeFlow and the closed-form baselines on cell types of your choice, bundled cells.

python benchmarks/held_out.py "CD4 T cell" "NK cell" "FCGR3A monocyte" --out results
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import invirtuo as iv
from invirtuo.bench import Entry, compare
from invirtuo.bench.entry import BASELINES


def main() -> None:
    """Hold out the response of the named cell types; print scores by condition and their mean."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cell_types", nargs="+")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="results")
    args = parser.parse_args()
    raw = iv.datasets.load("kang")
    design = iv.datasets.design("kang", raw)
    held_out = [{"cell_type": cell_type} for cell_type in args.cell_types]
    split = iv.splits.hold_out(raw.obs, design, held_out, seed=args.seed, control_fractions=(0.6, 0.1, 0.3))
    adata = iv.preprocess.normalize(raw, split=split)
    fit = replace(iv.models.PRiMeFlow.PRESETS["default"].fit, steps=args.steps, val_every=0, seed=args.seed)
    entries = [
        Entry("primeflow", "primeflow", None, fit),
        *BASELINES,
    ]
    scores = compare(adata, design, split, entries, args.out, seed=args.seed)
    for index in ("model", ["condition", "model"]):
        print(scores.pivot_table(index=index, columns="metric", values="value", sort=False).round(3).to_string())


if __name__ == "__main__":
    main()
