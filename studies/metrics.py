"""Cost of judging: the PerturBench set against its published arrangement, the cell-eval set against the package itself.

    python benchmarks/metrics.py perturbench --threads 2
    python benchmarks/metrics.py cell-eval --threads 2 --cell-eval-python OTHER/bin/python

The first compares one call of `evaluate`, ranks included, with one uncached pair after another: P^2 pairs for every
ranked metric, three float32 distance matrices a pair for the energy distances. A sample of the pairs is timed and
scaled up to all. Principal components, which both need once, are timed once and count for both. The second runs our
profile "cell_eval" and the package (in another environment, it is no dependency) on the same files in turn. CPU seconds
(user and system) of processes of their own are compared: they suffer least from other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEED = 0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

THEIRS = """
import json, resource, sys
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
import anndata, logging
from cell_eval import MetricsEvaluator
pred, real, out, threads, warm = sys.argv[1:]
def score(pred, real):
    roles = {"control_pert": "control", "pert_col": "gene"}
    evaluator = MetricsEvaluator(pred, real, **roles, num_threads=int(threads), outdir=out)
    return evaluator.compute(skip_metrics=["clustering_agreement"], write_csv=False)
pred, real = anndata.read_h5ad(pred), anndata.read_h5ad(real)
if warm == "warm":
    few = ["control", "P00", "P01", "P02"]
    score(*(adata[adata.obs["gene"].isin(few).to_numpy()][:, :200].copy() for adata in (pred, real)))
before = cpu()
score(pred, real)
print(json.dumps({"cpu": cpu() - before, "total": cpu(), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def screen(seed: int, n_perturbations: int, n_cells: int, n_controls: int, n_genes: int):
    """Log1p of counts per 10 000 of a synthetic screen, CSR float32; two seeds share the effects."""
    import anndata
    import numpy as np
    import pandas as pd
    from scipy import sparse

    truth, rng = np.random.default_rng(99), np.random.default_rng(seed)
    base = truth.lognormal(-2.2, 1.4, n_genes)
    blocks, labels = [], []
    for i in range(-1, n_perturbations):
        changed = truth.random(n_genes) < (0.05 if i >= 0 else 0)
        rate = base * np.exp(np.where(changed, truth.normal(0, 0.7, n_genes), 0))
        n = n_cells if i >= 0 else n_controls
        depth = rng.lognormal(0, 0.3, (n, 1))
        counts = sparse.csr_matrix(rng.poisson(rate * depth), dtype=np.float32)
        totals = np.asarray(counts.sum(axis=1)).ravel()
        blocks.append(sparse.diags_array((1e4 / totals).astype(np.float32)) @ counts)
        labels += [f"P{i:02d}" if i >= 0 else "control"] * n
    values = sparse.csr_matrix(sparse.vstack(blocks, format="csr"), dtype=np.float32).log1p()
    obs = pd.DataFrame({"gene": pd.Categorical(labels)}, index=[f"c{i}" for i in range(len(labels))])
    return anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=[f"G{i:05d}" for i in range(n_genes)]))


def cpu() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ours(pred: str, real: str, profile: str, warm: bool) -> dict[str, float]:
    """Score two files once: seconds, CPU seconds, CPU seconds with imports, peak memory in GiB."""
    import anndata

    import invirtuo as iv

    sides = [anndata.read_h5ad(path) for path in (pred, real)]
    design = iv.Design.from_adata(sides[1], perturbation="gene", control="control")
    if warm:
        small = [a[a.obs["gene"].isin(["control", "P00", "P01", "P02"]).to_numpy()][:, :200].copy() for a in sides]
        iv.evaluate(*small, design, profile, controls="pred")
    before, started = cpu(), time.perf_counter()
    iv.evaluate(*sides, design, profile, controls="pred" if profile == "cell_eval" else "real")
    return {
        "seconds": time.perf_counter() - started,
        "cpu": cpu() - before,
        "total": cpu(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def published(pred: str, real: str, n_sample: int) -> dict[str, float]:
    """Median CPU seconds of one uncached pair of conditions by metric, and those of the principal components."""
    import anndata
    import numpy as np
    import torch

    import invirtuo as iv
    from invirtuo.metrics import Pair, de, distribution, mean

    sides = [anndata.read_h5ad(path) for path in (pred, real)]
    design = iv.Design.from_adata(sides[1], perturbation="gene", control="control")
    pair = Pair(*sides, design)
    before = cpu()
    distribution.axes_of_all(pair)
    found = {"principal components": cpu() - before}
    rng = np.random.default_rng(SEED)

    def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squares = (x * x).sum(1)[:, None] - 2 * (x @ y.T) + (y * y).sum(1)[None]
        return squares.clamp_min(1e-8).sqrt().mean()

    def energy(x: np.ndarray, y: np.ndarray) -> float:
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        return float(distances(x, y) - distances(x, x) / 2 - distances(y, y) / 2)

    metrics = {
        "mmd_gex": ("cells", energy),
        "mmd_pca": ("pca", energy),
        "deg_recall": ("scores", de.top_k_recall),
        "cosine_logfc": ("logfc", mean.cosine),
        "rmse_mean": ("mean", mean.rmse),
    }
    names = pair.conditions.index
    for metric, (view, function) in metrics.items():
        times = []
        for repeat in range(n_sample + 1):
            i, j = rng.choice(len(names), 2)
            views = [pair.see(view, side, names[k]) for side, k in (("pred", i), ("real", j))]
            if function is energy:
                views = [np.ascontiguousarray(cells, dtype=np.float32) for cells in views]
            before = cpu()
            for _ in range(1 if function is energy else 100):
                function(*views)
            if repeat:
                times.append((cpu() - before) / (1 if function is energy else 100))
        found[metric] = statistics.median(times)
    return found


def child(arguments: list[str], threads: int, python: str = sys.executable, code: str | None = None) -> dict:
    """Run one measurement in a process of its own; its last line is JSON."""
    call = [python, "-c", code] if code else [python, __file__]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    done = subprocess.run([*call, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(call[:1])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def files(args: argparse.Namespace, folder: str, n_controls: int) -> list[str]:
    """Write both sides; print what they are."""
    paths = []
    for seed, name in ((1, "pred"), (2, "real")):
        adata = screen(seed, args.perturbations, args.cells, n_controls, args.genes)
        paths.append(str(Path(folder) / f"{name}.h5ad"))
        adata.write_h5ad(paths[-1])
    filled = adata.X.nnz / (adata.n_obs * adata.n_vars)
    print(f"{args.perturbations} perturbations x {args.cells} cells + {n_controls} controls, {args.genes} genes, "
          f"{filled:.0%} non-zero, {args.threads} threads, medians of {args.repeats} runs")  # fmt: skip
    return paths


def perturbench(args: argparse.Namespace) -> None:
    """The published set with ranks against uncached pairs."""
    with tempfile.TemporaryDirectory() as folder:
        paths = files(args, folder, args.controls or 1000)
        rows = []
        for _ in range(args.repeats):
            pairs = child(["published", *paths, str(args.sample)], args.threads)
            rows.append((child(["ours", *paths, "perturbench", "cold"], args.threads), pairs))
    total = args.perturbations**2
    print(f"published arrangement: {args.sample} of {total} pairs of each metric timed, EXTRAPOLATED to {total}")
    once = [pairs.pop("principal components") for _, pairs in rows]
    for metric in rows[0][1]:
        one = statistics.median(pairs[metric] for _, pairs in rows)
        print(f"  {metric:14s}{one * 1e3:10.3f} ms a pair{one * total:10.1f} s")
    print(f"  principal components, once on both sides{statistics.median(once):8.1f} s")
    theirs = [sum(pairs.values()) * total + shared for (_, pairs), shared in zip(rows, once, strict=True)]
    mine = [run["cpu"] for run, _ in rows]
    ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
    without = statistics.median((a - c) / (b - c) for a, b, c in zip(theirs, mine, once, strict=True))
    print(f"CPU seconds: published {statistics.median(theirs):.1f} (extrapolated), ours {statistics.median(mine):.1f} "
          f"({statistics.median(run['seconds'] for run, _ in rows):.1f} s wall), ratio {ratio:.1f}, "
          f"without principal components {without:.1f}; "
          f"our peak {max(run['peak'] for run, _ in rows):.2f} GiB")  # fmt: skip


def cell_eval(args: argparse.Namespace) -> None:
    """The profile "cell_eval" against the package."""
    with tempfile.TemporaryDirectory() as folder:
        paths = files(args, folder, args.controls or 2000)
        runs: dict[str, list[tuple[dict, dict]]] = {"cold": [], "warm": []}
        for _ in range(args.repeats):
            for state, rows in runs.items():
                mine = child(["ours", *paths, "cell_eval", state], args.threads)
                theirs = child([*paths, folder, str(args.threads), state], args.threads, args.cell_eval_python, THEIRS)
                rows.append((mine, theirs))
    print(f"{'CPU seconds':38s}{'cell-eval':>10s}{'ours':>8s}{'ratio':>8s}")
    for label, state, key in (
        ("whole process, imports and compilation", "cold", "total"),
        ("scoring after a small warm-up", "warm", "cpu"),
    ):
        pairs = [(theirs[key], mine[key]) for mine, theirs in runs[state]]
        columns = [statistics.median(pair[k] for pair in pairs) for k in (0, 1)]
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{label:38s}{columns[0]:10.2f}{columns[1]:8.2f}{ratio:8.1f}")


def main() -> None:
    """Measure one of the two, or be the process that is measured."""
    if sys.argv[1:2] == ["ours"]:
        _, _, pred, real, profile, state = sys.argv
        print(json.dumps(ours(pred, real, profile, state == "warm")))
        return
    if sys.argv[1:2] == ["published"]:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(published(*sys.argv[2:4], int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["perturbench", "cell-eval"])
    parser.add_argument("--perturbations", type=int, default=0, help="0: 60 for perturbench, 50 for cell-eval")
    parser.add_argument("--cells", type=int, default=0, help="of each perturbation; 0: 500 and 100")
    parser.add_argument("--controls", type=int, default=0, help="0: 1,000 and 2,000")
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--sample", type=int, default=20, help="pairs timed for each metric")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cell-eval-python", help="interpreter of an environment with cell-eval")
    args = parser.parse_args()
    first = args.which == "perturbench"
    if not first and not args.cell_eval_python:
        parser.error("cell-eval: give --cell-eval-python, an interpreter with that package installed")
    args.perturbations = args.perturbations or (60 if first else 50)
    args.cells = args.cells or (500 if first else 100)
    (perturbench if first else cell_eval)(args)


if __name__ == "__main__":
    main()
