"""Cells per second and peak memory of generating counts into a sparse file.

    python benchmarks/generate.py --cells 100000
    python benchmarks/generate.py --cells 100000 --scvi-python /path/to/python   # with scvi-tools, beside it

Models are fitted for a moment on the bundled cells (2,000 genes), so that counts are as sparse as real ones; speed does
not depend on how well they are fitted. Times are those of drawing, making sparse and writing. scVI samples z from its
prior, takes observed depths, and is written in the same way. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

N_GENES = 2000
CHUNK = 8192


def cells(path: Path):
    """Write the training cells and return them."""
    import invirtuo as iv

    raw = iv.datasets.load("kang")[:, :N_GENES].copy()
    raw.obs = raw.obs[["cell_type"]].copy()
    raw.write_h5ad(path)
    return raw


def ours(name: str, data: Path, out: Path, n: int) -> dict:
    """Fit for 20 steps and generate."""
    import anndata
    import torch

    import invirtuo as iv

    torch.set_num_threads(1)
    adata = anndata.read_h5ad(data)
    design = iv.Design.from_adata(adata, covariates=["cell_type"])
    fit = iv.FitConfig(steps=20, progress=False, val_every=0)
    model = iv.models.MODELS[name](design, adata.var_names).fit(adata, config=fit)
    model.generate(1000)  # warm
    start, busy = time.perf_counter(), time.process_time()
    made = model.generate(n, out=out, chunk_size=CHUNK)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    made.file.close()
    return {"model": name, "seconds": seconds, "cpu_seconds": busy}


def scvi(data: Path, out: Path, n: int) -> dict:
    """Train scVI for one epoch, sample its prior and write the counts."""
    import anndata
    import h5py
    import torch
    from anndata.io import sparse_dataset, write_elem
    from scipy import sparse
    from scvi.model import SCVI

    torch.set_num_threads(1)
    adata = anndata.read_h5ad(data)
    SCVI.setup_anndata(adata)
    model = SCVI(adata, gene_likelihood="nb")
    model.train(max_epochs=1, accelerator="cpu", logger=False)
    depth = np.asarray(adata.X.sum(axis=1)).ravel()
    rng, generative = np.random.default_rng(0), model.module.eval().generative
    start, busy = time.perf_counter(), time.process_time()
    with h5py.File(out, "w") as file, torch.no_grad():
        for begin in range(0, n, CHUNK):
            m = min(CHUNK, n - begin)
            z = torch.randn(m, model.module.n_latent)
            library = torch.log(torch.from_numpy(rng.choice(depth, m)).float())[:, None]
            counts = generative(z, library, torch.zeros(m, 1, dtype=torch.long))["px"].sample()
            part = sparse.csr_matrix(counts.numpy().astype(np.int32))
            if begin:
                sparse_dataset(file["X"]).append(part)
            else:
                part.indptr = part.indptr.astype(np.int64)
                write_elem(file, "X", part, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
    return {"model": "scvi", "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}


def worker(args) -> None:
    """Run one model and print its record."""
    data, out = Path(args.data), Path(args.out)
    record = scvi(data, out, args.cells) if args.run == "scvi" else ours(args.run, data, out, args.cells)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(record | {"gib": peak, "mb": out.stat().st_size / 1e6}))


def main() -> None:
    """Run every model in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--models", default="cfgen,independent_nb")
    parser.add_argument("--scvi-python", help="interpreter of an environment with scvi-tools")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        worker(args)
        return
    jobs = [(sys.executable, name) for name in args.models.split(",")]
    jobs += [(args.scvi_python, "scvi")] if args.scvi_python else []
    print(f"{args.cells:,} cells x {N_GENES:,} genes, one thread\n")
    print(f"{'model':18s}{'seconds':>9s}{'cpu':>9s}{'cells/s':>10s}{'entries/s':>12s}{'peak GiB':>10s}{'file MB':>9s}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "cells.h5ad"
        cells(data)
        for python, name in jobs:
            command = [python, __file__, "--run", name, "--data", data, "--out", Path(folder) / f"{name}.h5ad"]
            done = subprocess.run(
                [*map(str, command), "--cells", str(args.cells)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{name:18s} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            r = json.loads(done.stdout.strip().splitlines()[-1])
            rate = args.cells / r["cpu_seconds"]
            print(f"{name:18s}{r['seconds']:9.1f}{r['cpu_seconds']:9.1f}{rate:10.0f}{rate * N_GENES:12.2e}"
                  f"{r['gib']:10.2f}{r['mb']:9.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
