"""Every row of PRiMeFlow's comparison on data sets that fit a CPU: settings chosen on validation, then all seeds.

    python benchmarks/comparison.py --data-dir DATA --out comparison --trials 6 --seeds 3

Every model gets the same number of trials of the same search (PerturBench's objective on the validation conditions of
each task). Everything resumes: the same command goes on after a kill. The report lies in OUT/report.html.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from joblib import Parallel, delayed

from invirtuo.bench import TASKS, Entry, benchmark, tune

GUIDED = {f"guidance {weight}": {"guidance": float(weight)} for weight in (3, 5)}
PAPER = {"precondition": False, "anchor": False, "covariate_scale": 1.0, "hurdle": False, "loss_genes": 0}
MLP = {"velocity": "mlp", "hidden_dim": 512, "n_layers_decoding": 2, **PAPER}


def guided(label: str, *arguments) -> Entry:
    """An entry with further rows for guidance weights 3 and 5."""
    return Entry(label, *arguments, variants={f"{label}, {name}": options for name, options in GUIDED.items()})


ENTRIES = (
    guided("primeflow", "primeflow", None, {"steps": 1200}),
    Entry("primeflow:unet", "primeflow", "small", {"steps": 150}),
    guided("primeflow:mlp", "primeflow", MLP, {"steps": 2000, "lr": 3e-4}),
    guided("fm_pca", "fm_pca"),
    Entry("fm_pca:ot", "fm_pca", "ot"),
    Entry("cpa", "cpa"),
    Entry("cpa:no-adversary", "cpa", "no-adversary"),
    Entry("sams_vae", "sams_vae"),
    Entry("sams_vae:simple", "sams_vae", "simple"),
    Entry("biolord", "biolord"),
    Entry("latent_additive", "latent_additive"),
    Entry("decoder_only", "decoder_only"),
    Entry("linear_additive", "linear_additive"),
    Entry("ridge", "ridge"),
    Entry("ridge:kernel", "ridge", "kernel"),
)


def tuned(entry: Entry, task: str, trials: int, out: Path, data_dir: str | None) -> Entry:
    """The entry with the best setting found for the task."""
    if not trials:
        return entry
    folder = out / "tuned" / task / entry.label.replace(":", "-")
    return replace(tune(entry, task, trials, folder, data_dir=data_dir), task=task)


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose settings, fit, score, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[name for name, t in TASKS.items() if not t.published][1:])
    parser.add_argument("--models", nargs="*", default=[entry.label for entry in ENTRIES])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    args = parser.parse_args(arguments)
    wanted = [(entry, task) for task in args.tasks for entry in ENTRIES if entry.label in args.models]
    search = (delayed(tuned)(entry, task, args.trials, args.out, args.data_dir) for entry, task in wanted)
    entries = Parallel(args.jobs, backend="threading")(search)
    unique = {(entry.task, entry.label): entry for entry in entries}
    benchmark(
        args.tasks, [*unique.values()], args.seeds, args.out, n_jobs=args.jobs, data_dir=args.data_dir, progress=True
    )


if __name__ == "__main__":
    main()
