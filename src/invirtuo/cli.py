"""The command line: one verb, one call of the Python API.

Exit code 0 on success, 2 on bad input with one message on standard error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import typing
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="invirtuo",
    help="Train, sample and judge generative models of how single cells answer to perturbations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Covariate = Annotated[list[str] | None, typer.Option(help="Covariate column of obs; may be given several times.")]
Perturbation = Annotated[
    str | None,
    typer.Option("--perturbation", help="Column of obs with the perturbation labels, if cells were perturbed."),
]
Control = Annotated[str | None, typer.Option("--control", help="Label of the control cells in that column.")]
Unknown = Annotated[
    str | None, typer.Option(help="Covariate label of cells whose label is not known; so are empty ones.")
]
Run = Annotated[Path, typer.Argument(help="Folder of a fitted model.")]
Cells = Annotated[Path, typer.Argument(help="h5ad file with raw counts.")]
Weights = Annotated[
    list[str] | None,
    typer.Option("--guidance", help="Weight of all attributes, or attribute=weight; may be given several times."),
]
Steps = Annotated[int | None, typer.Option(help="Steps of the solver; the model's own if not given.")]
Solver = Annotated[
    str | None, typer.Option(help="euler, midpoint, heun, ab2, rk4 or dopri5; the model's own if not given.")
]
Separator = Annotated[str, typer.Option(help="Joins the parts of a combination.")]
Out = Annotated[Path, typer.Option(help="Where the result goes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no summary.")]


@app.command()
def demo(
    out: Out = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of split, fits and samples.")] = 0,
    minutes: Annotated[float, typer.Option(help="Scales the training to about this long on two cores.")] = 4.0,
    quiet: Quiet = False,
) -> None:
    """Run the main job on the bundled cells and write a report."""
    from invirtuo.bench import demo as run

    scores = run(out, seed=seed, minutes=minutes, progress=not quiet)
    if not quiet:
        _print_scores(scores)
        typer.echo(f"\nreport: {out / 'report.html'}")


@app.command(name="list")
def list_(what: Annotated[str, typer.Argument(help="models, metrics, datasets, tasks or splits.")]) -> None:
    """List what there is, with one line on each."""
    from invirtuo import bench, datasets, metrics, models, splits

    def first_line(thing: Any) -> str:
        return (thing.__doc__ or "").strip().splitlines()[0]

    tables = {
        "models": lambda: [
            (name, first_line(model), f"presets: {', '.join(model.PRESETS) or '-'}")
            for name, model in models.MODELS.items()
        ],
        "metrics": lambda: [
            (name, record.definition, _better(record), record.reference) for name, record in metrics.METRICS.items()
        ],
        "datasets": lambda: [
            (str(name), row["title"], "here" if row["here"] else f"needs {row['file']}")
            for name, row in datasets.describe().iterrows()
        ],
        "tasks": lambda: [
            (task.name, task.title, f"{task.dataset}; {', '.join(task.metrics)}") for task in bench.TASKS.values()
        ],
        "splits": lambda: [(name, first_line(split), "") for name, split in splits.SPLITS.items()],
    }
    if what not in tables:
        raise ValueError(f"cannot list {what!r}; expected one of {', '.join(tables)}")
    _print_rows(tables[what]())


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="h5ad file.")],
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    unknown: Unknown = None,
) -> None:
    """Say what is in a file, and what would go wrong with it; exit code 2 if something would."""
    from invirtuo import preprocess
    from invirtuo.design import Design
    from invirtuo.files import read_h5ad

    adata = read_h5ad(data)
    columns = {"perturbation": perturbation, "control": control, "covariates": covariate or []}
    design = Design.from_adata(adata, **columns, separator=separator, unknown=unknown)  # type: ignore[arg-type]
    findings = preprocess.check(adata, design)
    _print_rows([tuple(str(value) for value in row) for row in findings.itertuples(index=False)])
    if (findings["level"] == "error").any():
        _fail(f"{data}: {int((findings['level'] == 'error').sum())} error(s), listed above")


@app.command()
def prepare(
    data: Annotated[Path, typer.Argument(help="h5ad file with raw counts.")],
    out: Annotated[Path, typer.Argument(help="h5ad file to write.")],
    n_genes: Annotated[int | None, typer.Option(help="Number of variable genes to keep; all if not given.")] = None,
    size_factor: Annotated[str | None, typer.Option(help="Column of obs with the depth of each cell.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer that holds the raw counts, if not X.")] = None,
    split: Annotated[Path | None, typer.Option(help="Split file; genes are chosen on its training cells.")] = None,
    knockdown: Annotated[bool, typer.Option("--knockdown", help="Keep only cells that show the knock-down.")] = False,
    perturbation: Annotated[str | None, typer.Option(help="Needed for --knockdown.")] = None,
    control: Annotated[str | None, typer.Option(help="Needed for --knockdown.")] = None,
    covariate: Covariate = None,
) -> None:
    """Normalise raw counts to log1p(CP10k), choose genes, filter knock-downs."""
    from invirtuo import preprocess, splits
    from invirtuo.design import Design
    from invirtuo.files import read_h5ad, writing

    adata = read_h5ad(data)
    parts = None if split is None else splits.from_csv(split, adata.obs)
    prepared = preprocess.normalize(adata, n_genes=n_genes, size_factor=size_factor, layer=layer, split=parts)
    if knockdown:
        if perturbation is None or control is None:
            raise ValueError("--knockdown needs --perturbation and --control")
        design = Design.from_adata(prepared, perturbation=perturbation, control=control, covariates=covariate or [])
        prepared = preprocess.knockdown(prepared, design)
    with writing(out) as path:
        prepared.write_h5ad(path, compression="gzip")
    typer.echo(f"{out}: {prepared.n_obs:,} cells x {prepared.n_vars:,} genes")


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Name of a model; see `invirtuo list models`.")],
    data: Annotated[Path, typer.Argument(help="h5ad file in the data space of the model.")],
    out: Out,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    unknown: Unknown = None,
    dose: Annotated[str | None, typer.Option(help="Numeric column with the dose.")] = None,
    separator: Separator = "+",
    split: Annotated[str | None, typer.Option(help="Name of a split (`invirtuo list splits`) or a file.csv.")] = None,
    hold_out: Annotated[list[str] | None, typer.Option(help="Condition to hold out, or covariate=value.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the model.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value of the model's Config.")] = None,
    fit_set: Annotated[list[str] | None, typer.Option(help="field=value of the FitConfig.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    quiet: Quiet = False,
) -> None:
    """Fit a model and save it as a folder."""
    from invirtuo.design import Design
    from invirtuo.files import read_h5ad
    from invirtuo.models import MODELS

    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    adata = read_h5ad(data)
    columns = {"perturbation": perturbation, "control": control, "covariates": covariate or [], "dose": dose}
    design = Design.from_adata(adata, **columns, separator=separator, unknown=unknown)  # type: ignore[arg-type]
    parts = _split(adata.obs, design, split, hold_out)
    base = MODELS[model](design, adata.var_names, preset)
    fitted = MODELS[model](design, adata.var_names, _with_fields(base.config, set_)) if set_ else base
    config = _with_fields(base.fit_config, [*(fit_set or []), *(["progress=false"] if quiet else [])])
    fitted.fit(adata, split=parts, config=config, folder=out / "checkpoints", resume=resume)
    fitted.save(out)
    if not quiet:
        typer.echo(f"saved: {out}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a fitted model.")],
    out: Out,
    conditions: Annotated[str, typer.Option(help="FILE.csv with one row per condition, or test, or val.")] = "test",
    n_cells: Annotated[int, typer.Option("-n", "--n-cells", help="Cells per condition.")] = 1000,
    guidance: Annotated[float, typer.Option(help="Weight of classifier-free guidance; 1 is none.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver; the model's own if not given.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, midpoint, heun, ab2, rk4 or dopri5.")] = None,
    seed: int = 0,
    controls: Annotated[Path | None, typer.Option(help="h5ad with control cells to start from.")] = None,
    clamp_min: Annotated[float | None, typer.Option(help="Raise values below this to it.")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw cells for conditions from a fitted model."""
    from invirtuo.files import read_h5ad, writing
    from invirtuo.models import load

    wanted = conditions if conditions in ("test", "val") else _read_csv(Path(conditions))
    predicted = load(run).predict(
        wanted,
        n_cells=n_cells,
        guidance=guidance,
        steps=steps,
        solver=solver,
        seed=seed,
        controls=None if controls is None else read_h5ad(controls),
        clamp_min=clamp_min,
        progress=not quiet,
    )
    with writing(out) as path:
        predicted.write_h5ad(path, compression="gzip")
    if not quiet:
        typer.echo(f"{out}: {predicted.n_obs:,} cells")


@app.command()
def generate(
    run: Run,
    out: Out,
    n_cells: Annotated[int | None, typer.Option("-n", "--n-cells", help="Number of cells.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="attribute=label of all cells; may be given several times.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="FILE.csv with labels, one row per cell.")] = None,
    prior: Annotated[
        str, typer.Option(help="How other attributes are drawn: joint, independent or uniform.")
    ] = "joint",
    guidance: Weights = None,
    size_factor: Annotated[float | None, typer.Option(help="Total count of the cells; drawn if not given.")] = None,
    steps: Steps = None,
    solver: Solver = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Draw cells as counts from a fitted generator, written while they are drawn."""
    made = _generator(run, "generate").generate(
        n_cells,
        _pairs("--where", where),
        labels=None if labels is None else _read_csv(labels, "--labels"),
        prior=prior,
        guidance=_guidance(guidance),
        size_factor=size_factor,
        steps=steps,
        solver=solver,
        seed=seed,
        out=out,
        progress=not quiet,
    )
    if not quiet:
        typer.echo(f"{out}: {made.n_obs:,} cells")
    made.file.close()


@app.command()
def augment(
    run: Run,
    data: Cells,
    out: Out,
    by: Annotated[str, typer.Option(help="Attribute whose rare classes grow.")],
    target_size: Annotated[int, typer.Option(help="Real and generated cells in all.")],
    power: Annotated[float, typer.Option(help="Shares are proportional to (cells of the class)^(-power).")] = 1.0,
    max_fold: Annotated[float | None, typer.Option(help="Most generated cells for a real one.")] = None,
    min_cells: Annotated[int, typer.Option(help="Classes with fewer real cells are named.")] = 20,
    split: Annotated[Path | None, typer.Option(help="Split file; only its training cells are taken.")] = None,
    guidance: Weights = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Add generated cells to real ones, more of rare classes."""
    from invirtuo import splits
    from invirtuo.files import read_h5ad

    adata = read_h5ad(data)
    both = _generator(run, "augment").augment(
        adata,
        by,
        target_size,
        power=power,
        max_fold=max_fold,
        min_cells=min_cells,
        split=None if split is None else splits.from_csv(split, adata.obs),
        guidance=_guidance(guidance),
        seed=seed,
        progress=not quiet,
    )
    _write(both, out, quiet)


@app.command()
def correct(
    run: Run,
    data: Cells,
    out: Out,
    batch: Annotated[str, typer.Option(help="Covariate whose effect is taken out.")],
    reference: Annotated[
        str | None, typer.Option(help="Batch that cells are brought to; the largest if not given.")
    ] = None,
    guidance: Weights = None,
    invert_with: Annotated[str, typer.Option(help="Labels on the way to noise: own or unconditional.")] = "own",
    output: Annotated[str | None, typer.Option(help="Also decode corrected cells: mean or counts.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 50,
    solver: Solver = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Bring the cells of all batches to one batch."""
    from invirtuo.files import read_h5ad

    corrected = _generator(run, "correct").correct(
        read_h5ad(data),
        batch,
        reference=reference,
        guidance=_guidance(guidance),
        invert_with=invert_with,
        output=output,
        steps=steps,
        solver=solver,
        seed=seed,
        progress=not quiet,
    )
    _write(corrected, out, quiet)


@app.command()
def impute(
    run: Run,
    data: Cells,
    out: Out,
    masked_fraction: Annotated[float, typer.Option(help="Share of the counts of a cell that is missing.")] = 0.0,
    noise: Annotated[float, typer.Option(help="Jitter of the latent noise; above 0.1 it becomes another cell.")] = 0.05,
    n_draws: Annotated[int, typer.Option(help="Jittered copies that are averaged.")] = 10,
    steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 50,
    solver: Solver = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Write the means that the model expects for every entry into the layer "imputed"."""
    from invirtuo.files import read_h5ad

    options = {"masked_fraction": masked_fraction, "noise": noise, "n_draws": n_draws}
    imputed = _generator(run, "impute").impute(
        read_h5ad(data), **options, steps=steps, solver=solver, seed=seed, progress=not quiet
    )
    _write(imputed, out, quiet)


@app.command()
def embed(
    run: Run,
    data: Annotated[Path, typer.Argument(help="h5ad file in the data space of the model.")],
    out: Out,
    quiet: Quiet = False,
) -> None:
    """Encode cells."""
    from invirtuo.files import read_h5ad
    from invirtuo.models import load

    _write(load(run).embed(read_h5ad(data)), out, quiet)


@app.command()
def evaluate(
    pred: Annotated[Path, typer.Argument(help="h5ad with predicted cells.")],
    real: Annotated[Path, typer.Argument(help="h5ad with real cells, controls among them.")],
    out: Out,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    metrics: Annotated[str | None, typer.Option(help="Names joined by commas; see `invirtuo list metrics`.")] = None,
    n_pcs: Annotated[int, typer.Option(help="Principal components of mmd_pca.")] = 30,
    controls: Annotated[str, typer.Option(help="real: real controls on both sides; pred: each file's own.")] = "real",
    scale: Annotated[str, typer.Option(help="log1p; counts: normalised to the median depth first; auto.")] = "log1p",
    layer: Annotated[
        list[str] | None, typer.Option(help="Layer or obsm with the values, or pred=LAYER and real=LAYER.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Score predicted cells against real cells; writes a tidy CSV."""
    import invirtuo
    from invirtuo.files import read_h5ad, writing

    reality = read_h5ad(real)
    design = invirtuo.Design.from_adata(
        reality, perturbation=perturbation, control=control, covariates=covariate or [], separator=separator
    )
    names = metrics.split(",") if metrics else None
    options = {"n_pcs": n_pcs, "controls": controls, "scale": scale, "layer": _layers(layer)}
    scores = invirtuo.evaluate(read_h5ad(pred), reality, design, names, **options)
    with writing(out) as path:
        scores.to_csv(path, index=False)
    if not quiet:
        _print_scores(scores.assign(model=pred.stem))


@app.command()
def judge(
    real: Annotated[Path, typer.Argument(help="h5ad with real cells that no generator was trained on.")],
    generated: Annotated[list[str], typer.Option(help="name=FILE with generated cells; may be given several times.")],
    out: Out,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    metrics: Annotated[str, typer.Option(help="Names or profiles joined by commas.")] = "generation",
    n_pcs: Annotated[int, typer.Option(help="Principal components of metrics in that space.")] = 30,
    min_cells: Annotated[int, typer.Option(help="Real cells that a class needs to be scored by itself.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the noise floor and of the cells drawn.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Compare generated populations with real cells; writes tables and a report into a folder."""
    from invirtuo.bench import judge as judge_
    from invirtuo.design import Design
    from invirtuo.files import read_h5ad

    reality = read_h5ad(real)
    design = Design.from_adata(reality, perturbation=perturbation, control=control, covariates=covariate or [])
    sides = {name: read_h5ad(path) for name, path in _pairs("--generated", generated).items()}
    scores = judge_(
        sides, reality, design, out, metrics=metrics.split(","), n_pcs=n_pcs, min_cells=min_cells, seed=seed
    )
    if not quiet:
        _print_scores(scores[scores["task"] == scores["task"].iloc[-1]])
        typer.echo(f"report: {out / 'report.html'}")


@app.command()
def benchmark(
    tasks: Annotated[list[str], typer.Argument(help="Names of tasks; see `invirtuo list tasks`.")],
    out: Out = Path("results"),
    model: Annotated[
        list[str] | None, typer.Option(help="MODEL, MODEL:PRESET or FILE.json; may be given several times.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 5,
    engine: Annotated[str, typer.Option(help="local: processes on this machine; ray: a Ray cluster.")] = "local",
    baselines: Annotated[bool, typer.Option(help="Add the simple baselines.")] = True,
    metrics: Annotated[str | None, typer.Option(help="Names joined by commas, instead of those of the tasks.")] = None,
    n_jobs: Annotated[int | None, typer.Option(help="Cells computed at a time.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each cell.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with data files.")] = None,
    quiet: Quiet = False,
) -> None:
    """Fit and score models on tasks with several seeds; goes on where it was stopped."""
    from invirtuo import bench

    scores = bench.benchmark(
        tasks,
        model,
        seeds,
        out,
        engine,  # type: ignore[arg-type]
        baselines=baselines,
        metrics=metrics.split(",") if metrics else None,
        n_jobs=n_jobs,
        threads=threads,
        data_dir=data_dir,
        progress=not quiet,
    )
    if not quiet:
        for task, part in scores.groupby("task", sort=False):
            typer.echo(f"\n{task}")
            _print_scores(part)
        typer.echo(f"\nreport: {out / 'report.html'}")
    if failed := _failed(out / "costs.csv"):
        typer.echo(f"invirtuo: {failed} cell(s) failed, see {out / 'costs.csv'}; run again to try them again", err=True)
        raise typer.Exit(1)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="MODEL, MODEL:PRESET or FILE.json.")],
    task: Annotated[str, typer.Argument(help="Name of a task; its validation conditions are scored.")],
    out: Out = Path("tuned"),
    trials: Annotated[int, typer.Option(help="Number of trials, those of earlier runs included.")] = 20,
    objective: Annotated[
        str, typer.Option(help="metric=weight joined by commas; the sum is minimised.")
    ] = "rmse_mean=1,rmse_mean_rank=0.1",
    seed: Annotated[int, typer.Option(help="Of the search and of the fits.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of each fit.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with data files.")] = None,
    quiet: Quiet = False,
) -> None:
    """Choose hyperparameters on the validation conditions of a task; goes on where it was stopped."""
    from invirtuo import bench

    best = bench.tune(
        model,
        task,
        trials,
        out,
        objective=_weights(objective),
        seed=seed,
        threads=threads,
        data_dir=data_dir,
        progress=not quiet,
    )
    if not quiet:
        typer.echo(f"best setting of {best.label}: {out / 'best.json'}; all trials: {out / 'trials.csv'}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder with scores.csv.")],
    out: Out = Path("report.html"),
) -> None:
    """Write one HTML page about a folder of results."""
    from invirtuo.report import write_report

    typer.echo(f"report: {write_report(results, out)}")


def main() -> NoReturn:
    """Run the command line; bad input ends with exit code 2 and one message."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)  # deprecations inside other packages are not for a user of the shell
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if _is_usage(error):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if isinstance(error, (ValueError, FloatingPointError, OSError, MemoryError)):
            _fail(str(error) or type(error).__name__)
        raise


def _is_usage(error: Exception) -> bool:
    """Whether click or typer raised it about the command line itself."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _fail(message: str) -> NoReturn:
    typer.echo(f"invirtuo: {message}", err=True)
    sys.exit(2)


def _split(obs, design, split: str | None, hold_out: list[str] | None):
    """The split that --split or --hold-out asks for; None trains on all cells."""
    from invirtuo import splits

    if split and hold_out:
        raise ValueError("--split and --hold-out exclude each other; give one of them")
    if hold_out:
        return splits.hold_out(obs, design, [_condition(text) for text in hold_out])
    if split is None:
        return None
    if Path(split).suffix == ".csv" or Path(split).is_file():
        return splits.from_csv(Path(split), obs)
    choices = {name: splits.SPLITS[name] for name in ("transfer", "combine", "combine_inverse")}
    if split not in choices:
        raise ValueError(f"--split is {split!r}; expected a file.csv or one of {', '.join(choices)}; or use --hold-out")
    return choices[split](obs, design)


def _generator(run: Path, verb: str) -> Any:
    """The model of a folder, if it has the verb."""
    from invirtuo.models import MODELS, load

    model = load(run)
    if not hasattr(model, verb):
        able = [name for name, kind in MODELS.items() if hasattr(kind, verb)]
        raise ValueError(f"{run} holds {model.name}, which cannot {verb}; models that can: {', '.join(able)}")
    return model


def _write(adata: Any, out: Path, quiet: bool) -> None:
    from invirtuo.files import writing

    with writing(out) as path:
        adata.write_h5ad(path, compression="gzip")
    if not quiet:
        typer.echo(f"{out}: {adata.n_obs:,} cells")


def _pairs(option: str, assignments: list[str] | None) -> dict[str, str]:
    """``attribute=label`` as a mapping."""
    pairs: dict[str, str] = {}
    for text in assignments or []:
        name, equals, value = text.partition("=")
        if not equals or not name or name in pairs:
            raise ValueError(f"{option} {text!r}; expected attribute=value, each attribute once")
        pairs[name] = value
    return pairs


def _guidance(given: list[str] | None) -> float | dict[str, float] | None:
    """``2`` for all attributes, or ``cell_type=2 donor=1``."""
    if not given:
        return None
    try:
        if len(given) == 1 and "=" not in given[0]:
            return float(given[0])
        return {name: float(value) for name, value in _pairs("--guidance", given).items()}
    except ValueError as error:
        raise ValueError(f"--guidance {' '.join(given)}: {error}; expected a number, or attribute=number") from error


def _condition(text: str) -> str | dict[str, str]:
    """``cell_type=B cell`` as a mapping, anything else as the name of a condition."""
    column, equals, value = text.partition("=")
    return {column: value} if equals else text


def _with_fields(config: Any, assignments: list[str] | None) -> Any:
    """A Config with fields replaced by ``field=value``; unknown fields and wrong types are errors."""
    hints = typing.get_type_hints(type(config))
    changes = {}
    for text in assignments or []:
        name, equals, value = text.partition("=")
        if not equals or name not in hints:
            raise ValueError(f"cannot set {text!r}; expected field=value with a field of {', '.join(hints)}")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        changes[name] = _fitting(name, parsed, getattr(config, name))
    return dataclasses.replace(config, **changes)


def _fitting(name: str, value: Any, like: Any) -> Any:
    """The value in the type of the field."""
    if isinstance(like, bool) and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; expected true or false")
    if isinstance(like, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if like is not None and not isinstance(value, type(like)):
        raise ValueError(f"{name}={value!r}; expected a value like {like!r}")
    return value


def _failed(costs: Path) -> int:
    import pandas as pd

    return int((pd.read_csv(costs)["status"] == "failed").sum())


def _weights(text: str) -> dict[str, float]:
    """``rmse_mean=1,rmse_mean_rank=0.1`` as a mapping."""
    weights = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--objective: {part!r}; expected metric=weight, for example rmse_mean=1") from None
    return weights


def _better(metric: Any) -> str:
    """Direction and range of a metric."""
    ends = " to ".join(f"{end:g}".replace("inf", "∞") for end in metric.range)
    return f"{metric.direction} is better, {ends}" if metric.direction else ends


def _layers(given: list[str] | None) -> str | dict[str, str] | None:
    """``X_hvg`` for both files, or ``pred=X_hvg`` for one of them."""
    if not given or (len(given) == 1 and "=" not in given[0]):
        return given[0] if given else None
    named = dict(text.partition("=")[::2] for text in given)
    if len(named) < len(given) or not set(named) <= {"pred", "real"}:
        raise ValueError(f"--layer {' '.join(given)}; expected one name, or pred=NAME and real=NAME")
    return named


def _read_csv(path: Path, option: str = "--conditions"):
    import pandas as pd

    if not path.is_file():
        expected = "a CSV file, test or val" if option == "--conditions" else "a CSV file"
        raise ValueError(f"{option}: {path} does not exist; expected {expected}")
    try:
        return pd.read_csv(path, dtype=str)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from error


def _print_scores(scores) -> None:
    """Mean over conditions: a row per model, or, for one model, a row per metric."""
    table = scores.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", sort=False)
    if len(table) == 1:
        table = table.T
    rows = [(str(name), *(f"{value:.3f}" for value in row)) for name, row in table.iterrows()]
    _print_rows(rows, header=(table.index.name, *map(str, table.columns)))


def _print_rows(rows, header: tuple[str, ...] | None = None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = [tuple(escape(str(value)) for value in row) for row in rows]
    if not rows:
        return
    table = Table(show_header=header is not None, box=None, pad_edge=False)
    for name in header or [""] * len(rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
