"""Every row of PRiMeFlow's comparison on data sets that fit a CPU, fairly: chosen on validation, then all seeds.

Models that matter search with the same number of trials (PerturBench's objective on the validation conditions of each
task, of the first fold where there are several; the first trial is the setting that is not searched). Rows of learned
models come as drawn and with small values set to 0, all by the same rule. Models that start from control cells get
those of the evaluated split, as published (OUT/evaluated), and in a second benchmark those of training (OUT/train).
Conditions that a choice has looked at are marked. Everything resumes: the same command goes on after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from joblib import Parallel, delayed

from invirtuo import splits
from invirtuo.bench import TASKS, Entry, Task, benchmark, tune
from invirtuo.models import MODELS
from studies.harness import study

N_GENES, N_CELLS = 500, 300  # at most so many genes; predicted cells of each condition
METRICS = ("energy_distance", "variance_ratio")  # beside those of the task
BARE = {"hurdle": False, "calibrate": 0.0}
ONE_HOTS = {"anchor": False, "covariate_scale": 1.0, **BARE}
MLP = {"velocity": "mlp", "hidden_dim": 512, "n_layers_decoding": 2, "precondition": False, "loss_genes": 0, **ONE_HOTS}
ZEROS = "zeros"  # rows with values below the smallest training value set to 0


def drawn(label: str, *arguments, guided: bool = False) -> Entry:
    """An entry with further rows: small values set to 0, and guidance weights 3 and 5."""
    variants: dict[str, dict] = {f"{label}, {ZEROS}": {"zeros": "threshold"}}
    if guided:
        variants |= {f"{label}, guidance {weight}": {"guidance": float(weight)} for weight in (3, 5)}
    return Entry(label, *arguments, variants=variants)


ENTRIES = (
    drawn("primeflow", "primeflow", BARE, {"steps": 800}, guided=True),
    drawn("primeflow:one-hots", "primeflow", ONE_HOTS, {"steps": 800}),
    Entry("primeflow:default", "primeflow", None, {"steps": 800}),
    drawn("primeflow:unet", "primeflow", "small", {"steps": 4000}),
    drawn("primeflow:mlp", "primeflow", MLP, {"steps": 3000}),
    drawn("fm_pca", "fm_pca", None, {"steps": 1500}, guided=True),
    drawn("fm_pca:ot", "fm_pca", "ot", {"steps": 1500}),
    drawn("cpa", "cpa"),
    drawn("cpa:no-adversary", "cpa", "no-adversary"),
    drawn("sams_vae", "sams_vae"),
    drawn("sams_vae:simple", "sams_vae", "simple"),
    drawn("biolord", "biolord"),
    drawn("latent_additive", "latent_additive"),
    Entry("decoder_only", "decoder_only"),
    drawn("linear_additive", "linear_additive", None, {"steps": 400}),
    Entry("ridge", "ridge"),
    Entry("ridge:kernel", "ridge", "kernel"),
    Entry("ridge:move-cells", "ridge", "move-cells"),
    Entry("ridge:kernel-move-cells", "ridge", "kernel-move-cells"),
)
LABELS = tuple(entry.label for entry in ENTRIES if entry.label != "primeflow:unet")
SEARCHED = ("primeflow", "primeflow:mlp", "fm_pca", "cpa", "latent_additive")

# replicate 2 played no part in any choice
REPLICATE_2 = replace(
    TASKS["papalexi-replicate"],
    name="papalexi-replicate-2",
    splits=(partial(splits.manual, groups=("rep_2",), seed=0, fraction=1.0),),
)
NOTHING = Task(
    "mcfaline-null",
    "knock-downs without a DE gene, in lines in which they were not seen",
    "mcfaline_mini",
    (partial(splits.transfer, seed=0, fraction=0.3),),
)
JUDGED = {task.name: task for task in (TASKS["kang-celltype"], TASKS["glioblastoma-donor"], REPLICATE_2, NOTHING)}

# conditions that a choice has looked at: of the default network, or of the search here
DEVELOPMENT = {"kang-celltype": ("B cells|IFN-beta",), "glioblastoma-donor": ("PW032|panobinostat",)}


@study(quick={"tasks": ["kang-celltype"], "models": ["ridge"], "trials": 0, "seeds": 1, "jobs": 1})
def comparison(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = tuple(JUDGED),
    models: Sequence[str] = LABELS,
    searched: Sequence[str] = SEARCHED,
    trials: int = 12,
    seeds: int = 3,
    jobs: int = 2,
) -> None:
    """Every row of PRiMeFlow's comparison on data sets that fit a CPU.

    Parameters
    ----------
    searched
        Models whose settings are searched, task by task.
    trials
        Trials of each search; 0: settings as they are.
    """
    chosen = [entry for entry in ENTRIES if entry.label in models]
    sized, entries = [task_of(name) for name in tasks], []
    for i, task in enumerate(sized, start=1):
        search = (
            delayed(tuned)(entry, task, trials if entry.label in searched else 0, out, data_dir) for entry in chosen
        )
        entries += Parallel(jobs, backend="threading")(search)
        judged = [replace(each, metrics=(*each.metrics, *METRICS)) for each in sized[:i]]
        for controls in ("evaluated", "train"):
            concerned = [entry for entry in entries if controls == "evaluated" or starts_from_controls(entry)]
            benchmark(judged, concerned, seeds, out / controls, controls=controls, n_jobs=jobs, data_dir=data_dir,
                      progress=True)  # fmt: skip


def task_of(name: str) -> Task:
    """A task at the size of this comparison."""
    task = {**TASKS, **JUDGED}[name]
    return replace(task, n_genes=task.n_genes and min(task.n_genes, N_GENES), n_cells=N_CELLS)


def starts_from_controls(entry: Entry) -> bool:
    """Whether it matters to an entry which control cells it gets."""
    return MODELS[entry.model].needs_source or entry.label == "fm_pca:ot"


def tuned(entry: Entry, task: Task, trials: int, out: Path, data_dir: str | None) -> Entry:
    """The entry for a task, with the best setting found."""
    if trials:
        folder = out / "tuned" / task.name / entry.label.replace(":", "-")
        entry = tune(entry, replace(task, splits=task.splits[:1]), trials, folder, data_dir=data_dir)
    config, _ = entry.settings()
    if getattr(config, "prob_unconditional", 1.0) == 0:  # there is no null condition to be guided away from
        entry = replace(entry, variants={name: own for name, own in entry.variants.items() if "guidance" not in own})
    return replace(entry, task=task.name)
