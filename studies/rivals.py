"""What other packages do of the same work; called in environments of their own, which lack this package.

pip install scDataset==0.3.0 cell-load==0.10.4        # for scale-measure
pip install "annbatch[zarrs]==0.3.1" cellstream==0.11.0 torch  # for scale-measure, Python >= 3.12
pip install cell-eval                                 # for metrics-cell-eval
pip install scvi-tools                                # for generate
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
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


def write_files(case: str, folder: str) -> None:
    """Write the cells of `scale-make` in the format of another loader."""
    next(READERS[case](Path(folder)))


def read_files(case: str, folder: str, cells: int) -> dict:
    """One pass of another loader over the cells of `scale-make`, until so many cells are read.

    No worker processes: these would spread the same CPU seconds. Batches of 512 cells, dense float32; opening counts,
    and what is read ahead. scDataset reads backed h5ad files through an AnnCollection, as in its paper
    (arXiv:2506.01883), in blocks of 16 rows and fetches of 256 batches, or with the blocks and the memory that ours
    has. cell-load gives sets of 64 cells with as many control cells, 8 sets at a time, with and without
    `use_consecutive_loading`. annbatch and cellstream read their own formats, which do not
    count: annbatch a shuffled collection, in chunks of 512 cells, as many at a time as by default or as ours holds;
    cellstream an archive grouped by perturbation, random cells, or sets of 64 of a perturbation beside controls.
    """
    n = 0
    batches = READERS[case](Path(folder))
    next(batches)
    with spent() as cost:
        for size in batches:
            n += size
            if n >= cells:
                break
    return {"cells": n} | cost


def scdataset(folder: Path, block: int, fetches: int):
    """Batches of scDataset."""
    import anndata
    from anndata.experimental import AnnCollection
    from scdataset import BlockShuffling, scDataset

    yield
    parts = [anndata.read_h5ad(path, backed="r") for path in plates(folder)]
    collection = AnnCollection(parts, join_vars="inner", harmonize_dtypes=True)
    options = {"fetch_transform": lambda view: view.X, "batch_transform": lambda x: np.asarray(x.todense(), np.float32)}
    for x in scDataset(collection, BlockShuffling(block), BATCH, fetch_factor=fetches, seed=0, **options):
        yield len(x)


def cell_load(folder: Path, consecutive: bool):
    """Batches of cell-load."""
    from cell_load.data_modules import PerturbationDataModule

    yield
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(f'[datasets]\nscreen = "{folder}/files"\n[training]\nscreen = "train"\n[zeroshot]\n[fewshot]\n')
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


def annbatch(folder: Path, chunks: int):
    """Batches of annbatch, so many chunks in memory; the decoder that its authors recommend."""
    import zarr
    from annbatch import DatasetCollection, Loader

    written = folder / "annbatch.zarr"
    if not written.exists():
        DatasetCollection(written).add_adatas(plates(folder))
    yield
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
    rng = np.random.default_rng(0)
    loader = Loader(batch_size=BATCH, chunk_size=512, preload_nchunks=chunks, shuffle=True, rng=rng)
    for batch in loader.use_collection(DatasetCollection(written, mode="r")):
        yield len(batch["X"].toarray())


def cellstream(folder: Path, in_sets: bool):
    """Batches of cellstream: random cells, or sets of a perturbation with as many random controls."""
    import anndata
    import cellstream

    written = folder / "screen.csad"
    if not written.exists():
        cells = anndata.concat([anndata.read_h5ad(path) for path in plates(folder)], merge="same")
        cellstream.write_sharded(cells, written, layout="cell", group_by="perturbation", reference=["control"])
    yield
    store, rng = cellstream.open(written), np.random.default_rng(0)
    if not in_sets:
        for rows in np.array_split(rng.permutation(store.n_obs), -(-store.n_obs // BATCH)):
            yield len(store.gather_rows(rows).toarray())
        return
    control, *groups = (rng.permutation(np.arange(span.start, span.stop)) for span in store.group_spans())
    sets = [group[i : i + SET] for group in groups for i in range(0, len(group), SET)]
    rng.shuffle(sets)
    for i in range(0, len(sets), BATCH // SET):
        rows = np.concatenate(sets[i : i + BATCH // SET])
        store.gather_rows(rng.choice(control, len(rows))).toarray()
        yield len(store.gather_rows(rows).toarray())


def plates(folder: Path) -> list[Path]:
    """The files of `scale-make`."""
    return sorted((folder / "files").glob("*.h5ad"))


READERS: dict[str, Callable[[Path], Iterator[int | None]]] = {  # the first step writes what they read
    "scDataset": partial(scdataset, block=16, fetches=256),
    "scDataset, blocks of 512": partial(scdataset, block=512, fetches=180),
    "cell-load": partial(cell_load, consecutive=False),
    "cell-load, consecutive": partial(cell_load, consecutive=True),
    "annbatch": partial(annbatch, chunks=32),
    "annbatch, memory as ours": partial(annbatch, chunks=180),
    "cellstream": partial(cellstream, in_sets=False),
    "cellstream, sets": partial(cellstream, in_sets=True),
}
