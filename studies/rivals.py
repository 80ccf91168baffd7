"""What other packages do of the same work; called in environments of their own, which lack this package.

pip install scDataset==0.3.0 cell-load==0.10.4        # for scale-measure
pip install cell-eval                                 # for metrics-cell-eval
pip install scvi-tools                                # for generate
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from studies.harness import cpu_seconds, spent

CHUNK = 8192  # cells that are written at a time
BATCH, SET = 512, 64
SIXTH = "expr_mse_unbiased_capped_norm"


def scvi(data: str, out: str, n: int) -> dict:
    """Train scVI for one epoch, sample its prior and write the counts."""
    import anndata
    import h5py
    import torch
    from anndata.io import sparse_dataset, write_elem
    from scipy import sparse
    from scvi.model import SCVI

    adata = anndata.read_h5ad(data)
    SCVI.setup_anndata(adata)
    model = SCVI(adata, gene_likelihood="nb")
    model.train(max_epochs=1, accelerator="cpu", logger=False)
    depth = np.asarray(adata.X.sum(axis=1)).ravel()
    rng, generative = np.random.default_rng(0), model.module.eval().generative
    with spent() as cost, h5py.File(out, "w") as file, torch.no_grad():
        for begin in range(0, n, CHUNK):
            m = min(CHUNK, n - begin)
            z = torch.randn(m, model.module.n_latent)
            library = torch.log(torch.from_numpy(rng.choice(depth, m)).float())[:, None]
            counts = generative(z, library, torch.zeros(m, 1, dtype=torch.long))["px"].sample()
            chunk = sparse.csr_matrix(counts.numpy().astype(np.int32))
            if begin:
                sparse_dataset(file["X"]).append(chunk)
            else:
                chunk.indptr = chunk.indptr.astype(np.int64)
                write_elem(file, "X", chunk, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
    return cost


def cell_eval(pred: str, real: str, out: str, warm: bool) -> dict:
    """Score two files with cell-eval; CPU seconds of scoring alone."""
    import anndata
    from cell_eval import MetricsEvaluator

    def score(pred, real):
        roles = {"control_pert": "control", "pert_col": "gene"}
        evaluator = MetricsEvaluator(pred, real, **roles, num_threads=int(os.environ["OMP_NUM_THREADS"]), outdir=out)
        return evaluator.compute(skip_metrics=["clustering_agreement"], write_csv=False)

    sides = [anndata.read_h5ad(path) for path in (pred, real)]
    if warm:
        few = ["control", "P00", "P01", "P02"]
        score(*(adata[adata.obs["gene"].isin(few).to_numpy()][:, :200].copy() for adata in sides))
    before = cpu_seconds()
    score(*sides)
    return {"scoring_seconds": cpu_seconds() - before}


def cell_eval2(pred: str, real: str) -> dict:
    """The six metrics of two files of counts with cell-eval2: CPU seconds of reading and scoring, and a mean."""
    from cell_eval2 import EvalConfig, aggregate_metrics, compute_metrics
    from cell_eval2.config import DEParams

    before = cpu_seconds()
    config = EvalConfig(metrics="vcc2026", pert_col="gene", control="control", control_source="real", device="cpu",
                        num_threads=int(os.environ["OMP_NUM_THREADS"]), target_gene_map={"*": None},
                        bulk_target_sum=1000, de=DEParams(backend="pdex"))  # fmt: skip
    table = aggregate_metrics(compute_metrics(pred, real, config=config))
    spent = cpu_seconds() - before
    means = dict(zip(table["metric"], table["mean"], strict=True))
    six = [name for name in means if name.startswith("de_wilcoxon") or name in ("pds_cosine", SIXTH)]
    return {"scoring_seconds": spent, "mean": float(np.mean([means[name] for name in six]))}


def read_files(case: str, folder: str, cells: int) -> dict:
    """One pass of scDataset or cell-load over the files of `scale-make`, until so many cells are read.

    No worker processes: these would spread the same CPU seconds. Batches of 512 cells, dense float32; opening counts,
    and what is read ahead. scDataset reads backed h5ad files through an AnnCollection, as in its paper
    (arXiv:2506.01883), in blocks of 16 rows and fetches of 256 batches, or with the blocks and the memory that ours
    has. cell-load gives sets of 64 cells with as many control cells, 8 sets at a time, with and without
    `use_consecutive_loading`.
    """
    files = sorted(Path(folder).glob("*.h5ad"))
    if case.startswith("cell-load"):
        batches = cell_load(files, case.endswith("consecutive"))
    else:
        batches = scdataset(files, *((16, 256) if case == "scDataset" else (512, 180)))
    n = 0
    with spent() as cost:
        for size in batches:
            n += size
            if n >= cells:
                break
    return {"cells": n} | cost


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
