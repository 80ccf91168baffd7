"""Every row of PRiMeFlow's comparison on data sets that fit a CPU: settings chosen on validation, then all seeds.

    python benchmarks/comparison.py --data-dir DATA --out comparison --trials 3 --seeds 3

Every model gets the same number of trials of the same search (PerturBench's objective on the validation conditions of
each task, of the first fold where there are several; the first trial is the default). Tasks are done one after the
other and the report in OUT/report.html grows with them. Everything resumes: the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from joblib import Parallel, delayed

from invirtuo.bench import TASKS, Entry, Task, benchmark, tune

N_GENES, N_CELLS = 500, 300  # at most so many genes; predicted cells of each condition
METRICS = ("energy_distance", "variance_ratio")  # beside those of the task
GUIDED = {f"guidance {weight}": {"guidance": float(weight)} for weight in (3, 5)}
PAPER = {"precondition": False, "anchor": False, "covariate_scale": 1.0, "hurdle": False, "loss_genes": 0}
MLP = {"velocity": "mlp", "hidden_dim": 512, "n_layers_decoding": 2, **PAPER}


def guided(label: str, *arguments) -> Entry:
    """An entry with further rows for guidance weights 3 and 5."""
    return Entry(label, *arguments, variants={f"{label}, {name}": options for name, options in GUIDED.items()})


ENTRIES = (
    guided("primeflow", "primeflow", None, {"steps": 800}),
    Entry("primeflow:unet", "primeflow", "small", {"steps": 600}),
    guided("primeflow:mlp", "primeflow", MLP, {"steps": 1200, "lr": 3e-4}),
    guided("fm_pca", "fm_pca", None, {"steps": 1500}),
    Entry("fm_pca:ot", "fm_pca", "ot", {"steps": 1000}),
    Entry("cpa", "cpa"),
    Entry("cpa:no-adversary", "cpa", "no-adversary"),
    Entry("sams_vae", "sams_vae"),
    Entry("sams_vae:simple", "sams_vae", "simple"),
    Entry("biolord", "biolord"),
    Entry("latent_additive", "latent_additive"),
    Entry("decoder_only", "decoder_only"),
    Entry("linear_additive", "linear_additive", None, {"steps": 1000}),
    Entry("ridge", "ridge"),
    Entry("ridge:kernel", "ridge", "kernel"),
)


def task_of(name: str) -> Task:
    """A task at the size of this comparison."""
    task = TASKS[name]
    return replace(task, n_genes=task.n_genes and min(task.n_genes, N_GENES), n_cells=N_CELLS)


def tuned(entry: Entry, task: Task, trials: int, out: Path, data_dir: str | None) -> Entry:
    """The entry for a task, with the best setting found."""
    if trials:
        folder = out / "tuned" / task.name / entry.label.replace(":", "-")
        entry = tune(entry, replace(task, splits=task.splits[:1]), trials, folder, data_dir=data_dir)
    config, _ = entry.settings()
    if getattr(config, "prob_unconditional", 1.0) == 0:  # there is no null condition to be guided away from
        entry = replace(entry, variants={})
    return replace(entry, task=task.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose settings, fit, score, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[name for name, t in TASKS.items() if not t.published][1:])
    parser.add_argument("--models", nargs="*", default=[entry.label for entry in ENTRIES])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--unguided", action="store_true", help="leave out the rows with guidance")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    args = parser.parse_args(arguments)
    chosen = [entry for entry in ENTRIES if entry.label in args.models]
    if args.unguided:
        chosen = [replace(entry, variants={}) for entry in chosen]
    tasks, entries = [task_of(name) for name in args.tasks], []
    for i, task in enumerate(tasks, start=1):
        search = (delayed(tuned)(entry, task, args.trials, args.out, args.data_dir) for entry in chosen)
        entries += Parallel(args.jobs, backend="threading")(search)
        judged = [replace(task, metrics=(*task.metrics, *METRICS)) for task in tasks[:i]]
        benchmark(
            judged, entries, args.seeds, args.out, n_jobs=args.jobs, data_dir=args.data_dir, progress=True
        )  # fmt: skip


if __name__ == "__main__":
    main()
