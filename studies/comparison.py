"""Every row of PRiMeFlow's comparison on data sets that fit a CPU: settings chosen on validation, then all seeds.

Every model gets the same number of trials of the same search (PerturBench's objective on the validation conditions of
each task, of the first fold where there are several; the first trial is the default). Tasks are done one after the
other and the report in OUT/report.html grows with them. Everything resumes: the same command goes on after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from joblib import Parallel, delayed

from invirtuo.bench import TASKS, Entry, Task, benchmark, tune
from studies.harness import study

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


UNPUBLISHED = tuple(name for name, task in TASKS.items() if not task.published)[1:]
LABELS = tuple(entry.label for entry in ENTRIES)


@study(quick={"tasks": ["kang-celltype"], "models": ["ridge"], "trials": 0, "seeds": 1, "jobs": 1})
def comparison(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = UNPUBLISHED,
    models: Sequence[str] = LABELS,
    trials: int = 3,
    unguided: bool = False,
    seeds: int = 3,
    jobs: int = 2,
) -> None:
    """Every row of PRiMeFlow's comparison on data sets that fit a CPU.

    Parameters
    ----------
    trials
        Trials of the search for each model and task; 0: settings as they are.
    unguided
        Leave out the rows with guidance.
    """
    chosen = [entry for entry in ENTRIES if entry.label in models]
    if unguided:
        chosen = [replace(entry, variants={}) for entry in chosen]
    sized, entries = [task_of(name) for name in tasks], []
    for i, task in enumerate(sized, start=1):
        search = (delayed(tuned)(entry, task, trials, out, data_dir) for entry in chosen)
        entries += Parallel(jobs, backend="threading")(search)
        judged = [replace(each, metrics=(*each.metrics, *METRICS)) for each in sized[:i]]
        benchmark(judged, entries, seeds, out, n_jobs=jobs, data_dir=data_dir, progress=True)


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
