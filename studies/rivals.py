"""What scDataset and cell-load read of the files of `scale.py make`; run by `scale.py measure --rivals PYTHON`.

    pip install scDataset==0.3.0 cell-load==0.10.4        # in an environment of their own

No worker processes: these would spread the same CPU seconds. Batches of 512 cells, dense float32; the pass ends after
`--cells` cells and includes opening and what is read ahead for them. scDataset reads backed h5ad files through an
AnnCollection, as in its paper (arXiv:2506.01883), in blocks of 16 rows and fetches of 256 batches, or with the blocks
and the memory that ours has. cell-load gives sets of 64 cells with as many control cells, 8 sets at a time, with and
without `use_consecutive_loading`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH, SET = 512, 64
CASES = ("scDataset", "scDataset, blocks of 512", "cell-load", "cell-load, consecutive")


def scdataset(files: list[Path], block: int, fetches: int):
    """Batches of scDataset."""
    import anndata
    from anndata.experimental import AnnCollection
    from scdataset import BlockShuffling, scDataset

    parts = [anndata.read_h5ad(path, backed="r") for path in files]
    collection = AnnCollection(parts, join_vars="inner", harmonize_dtypes=True)
    options = {"fetch_transform": lambda view: view.X, "batch_transform": lambda x: np.asarray(x.todense(), np.float32)}
    for x in scDataset(collection, BlockShuffling(block), BATCH, fetch_factor=fetches, seed=0, **options):
        yield len(x)


def cell_load(files: list[Path], consecutive: bool):
    """Batches of cell-load."""
    from cell_load.data_modules import PerturbationDataModule

    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(f'[datasets]\nscreen = "{files[0].parent}"\n[training]\nscreen = "train"\n[zeroshot]\n[fewshot]\n')
        config.flush()
        module = PerturbationDataModule(
            toml_config_path=config.name,
            batch_size=BATCH // SET,
            num_workers=0,
            pert_col="perturbation",
            batch_col="plate",
            cell_type_key="cell_line",
            control_pert="control",
            output_space="all",
            embed_key=None,
            cell_sentence_len=SET,
            basal_mapping_strategy="random",
            use_consecutive_loading=consecutive,
        )
        module.setup()
        for batch in module.train_dataloader():
            yield len(batch["pert_cell_emb"])


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=100_000)
    args = parser.parse_args()
    files = sorted(args.folder.glob("*.h5ad"))
    if args.case.startswith("cell-load"):
        batches = cell_load(files, args.case.endswith("consecutive"))
    else:
        batches = scdataset(files, *((16, 256) if args.case == "scDataset" else (512, 180)))
    n, begun, started = 0, os.times(), time.perf_counter()
    for size in batches:
        n += size
        if n >= args.cells:
            break
    spent, wall = sum(os.times()[:4]) - sum(begun[:4]), time.perf_counter() - started
    print(json.dumps({
        "case": args.case, "cells": n, "cpu_seconds": round(spent, 2),
        "wall_seconds": round(wall, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "cells_per_cpu_second": round(n / spent), "cells_per_second": round(n / wall)}))  # fmt: skip


if __name__ == "__main__":
    main()
