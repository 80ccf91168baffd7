"""Verbs of models: fit one, and let it predict, generate, change or encode cells."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from invirtuo.cli.options import (
    Batch,
    Cells,
    Conditions,
    Control,
    Covariate,
    Device,
    FitSet,
    HoldOut,
    HoldOutVal,
    OutCells,
    OutFolder,
    Overwrite,
    Perturbation,
    Quiet,
    Run,
    Separator,
    Set,
    Solver,
    Split,
    Steps,
    Time,
    Unknown,
    Weights,
    given,
    model_with,
    pairs,
    read_conditions,
    read_csv,
    read_genes,
    split_of,
    with_fields,
)
from invirtuo.cli.toml import Config, write_run

RoundTrip = Annotated[int | None, typer.Option(help="Steps of the solver; 50 if not given.")]


def fit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of a model, see `invirtuo list models`; or module:Class.")],
    data: Annotated[
        list[Path],
        typer.Argument(help="h5ad file in the data space of the model; several, or a folder, are read from disk."),
    ],
    out: OutFolder,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    unknown: Unknown = None,
    dose: Annotated[str | None, typer.Option(help="Numeric column with the dose.")] = None,
    time: Time = None,
    batch: Batch = None,
    separator: Separator = "+",
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="What is known of perturbations, as `invirtuo list features` names; several stand side by side."
        ),
    ] = None,
    features_missing: Annotated[
        str, typer.Option(help="Perturbations that a source lacks: error, or mean of its vectors.")
    ] = "error",
    unseen: Annotated[
        list[str] | None,
        typer.Option(help="Perturbation to know by its features beside those of the data, or FILE.csv of them."),
    ] = None,
    split: Split = None,
    hold_out: HoldOut = None,
    hold_out_val: HoldOutVal = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the model.")] = None,
    regulators: Annotated[
        list[str] | None,
        typer.Option(help="Gene that may act on others, or FILE with one a line, such as transcription factors."),
    ] = None,
    set_: Set = None,
    fit_set: FitSet = None,
    memory: Annotated[str | None, typer.Option(help="Leave cells on disk and hold this much, like 256 MiB.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    overwrite: Overwrite = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Fit a model and save it as a folder."""
    from invirtuo.design import Design
    from invirtuo.fit import is_main
    from invirtuo.models import model_class, model_names
    from invirtuo.verbs.saving import check_free, holds_model

    kind = model_class(model)
    check_free(out, overwrite=overwrite or resume)

    # cells, roles of their columns, split
    adata = _cells(data, memory)
    columns: dict[str, Any] = {"perturbation": perturbation, "control": control, "covariates": covariate or []}
    columns |= {"dose": dose, "time": time, "batch": batch}
    design = Design.from_adata(adata.obs, **columns, separator=separator, unknown=unknown)
    if features or unseen:
        if not kind.takes_features:
            able = [name for name in model_names() if model_class(name).takes_features]
            raise ValueError(f"{model} takes no features of perturbations; those that do: {', '.join(able)}")
        design = design.with_features(_features(features or [], features_missing, unseen or [], adata, design))
    assignment = split_of(adata.obs, design, split, hold_out, hold_out_val)

    # the preset with the fields that are set
    base = kind(design, adata.var_names, preset)
    listing = f"invirtuo list models {model}"
    chosen = with_fields(base.config, set_, listing)
    if regulators:
        if not hasattr(chosen, "regulators"):
            raise ValueError(f"{model} reads no network between genes; leave --regulators out, or fit sparse_ode")
        names = tuple(read_genes(regulators, adata.var_names, "--regulators"))
        chosen = dataclasses.replace(chosen, regulators=names)
    fitted = kind(design, adata.var_names, chosen) if set_ or regulators else base
    fit_set = [*(fit_set or []), *(["progress=false"] if quiet else [])]
    asked = with_fields(base.fit_config, fit_set, f"{listing} --fit")

    # a fit that ended is not fitted again
    checkpoints = out / "checkpoints"
    if resume and holds_model(out) and _is_finished(out, fitted, asked):
        typer.echo(f"nothing to resume: {out} holds the model of this fit, which ended; --overwrite fits it anew")
        _end_checkpoints(checkpoints, fitted, asked)
        return
    check_free(out, overwrite=overwrite)

    # checkpoints stay until the model is saved, whatever happens in between
    lasting = dataclasses.replace(asked, keep_checkpoints=True)
    fitted.fit(adata, split=assignment, config=lasting, folder=checkpoints, resume=resume, overwrite=overwrite)
    fitted.card["fit"]["keep_checkpoints"] = asked.keep_checkpoints
    fitted.save(out, overwrite=overwrite)
    _end_checkpoints(checkpoints, fitted, asked)
    if is_main():
        write_run(context, out)
    if warning := fitted.card.get("warning"):
        typer.echo(f"invirtuo: warning: {warning}", err=True)
    if not quiet and is_main():
        typer.echo(f"saved: {out}")


def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a fitted model.")],
    out: OutCells,
    conditions: Conditions = None,
    n_cells: Annotated[int, typer.Option("-n", "--n-cells", help="Cells per condition.")] = 1000,
    guidance: Annotated[
        list[str] | None,
        typer.Option(help="Weight of classifier-free guidance (1 is none), or perturbation=W and covariates=W."),
    ] = None,
    steps: Steps = None,
    solver: Solver = None,
    seed: int = 0,
    controls: Annotated[Path | None, typer.Option(help="h5ad with control cells to start from.")] = None,
    clamp_min: Annotated[float | None, typer.Option(help="Raise values below this to it.")] = None,
    zeros: Annotated[
        str | None, typer.Option(help="How values become cells with zeros: threshold, or moved control cells.")
    ] = None,
    effect_level: Annotated[
        float | None,
        typer.Option(help="Also give effects with intervals that cover this share of genes, for example 0.9."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="log: log1p values (default). counts: whole counts.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: conditions spread over a Ray cluster.")] = "local",
    n_jobs: Annotated[int | None, typer.Option(help="Processes of --engine ray without a cluster.")] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Draw cells for conditions from a fitted model, written while they are drawn."""
    wanted = read_conditions(conditions)
    options = given(
        guidance=_guidance(guidance),
        steps=steps,
        solver=solver,
        controls=controls,
        clamp_min=clamp_min,
        zeros=zeros,
        effect_level=effect_level,
        output=output,
        n_jobs=n_jobs,
        device=device,
    )
    predicted = model_with(run, "predict").predict(
        wanted, n_cells, seed=seed, out=out, engine=engine, progress=not quiet, **options
    )
    if not quiet:
        typer.echo(f"{out}: {predicted.n_obs:,} cells")
    predicted.file.close()


def generate(
    run: Run,
    out: OutCells,
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
    engine: Annotated[str, typer.Option(help="local, or ray: cells spread over a Ray cluster.")] = "local",
    n_jobs: Annotated[int | None, typer.Option(help="Processes of --engine ray without a cluster.")] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Draw cells as counts from a fitted generator, written while they are drawn."""
    wanted = None if labels is None else read_csv(labels, "--labels")
    options = given(
        labels=wanted,
        guidance=_guidance(guidance),
        size_factor=size_factor,
        steps=steps,
        solver=solver,
        n_jobs=n_jobs,
        device=device,
    )
    generated = model_with(run, "generate").generate(
        n_cells,
        pairs("--where", where),
        prior=prior,
        seed=seed,
        out=out,
        engine=engine,
        progress=not quiet,
        **options,
    )
    if not quiet:
        typer.echo(f"{out}: {generated.n_obs:,} cells")
    generated.file.close()


def augment(
    run: Run,
    data: Cells,
    out: OutCells,
    by: Annotated[str, typer.Option(help="Attribute whose rare classes grow.")],
    target_size: Annotated[int, typer.Option(help="Real and generated cells in all.")],
    power: Annotated[float, typer.Option(help="Shares are proportional to (cells of the class)^(-power).")] = 1.0,
    max_fold: Annotated[float | None, typer.Option(help="Most generated cells for a real one.")] = None,
    min_cells: Annotated[int, typer.Option(help="Classes with fewer real cells are named.")] = 20,
    split: Annotated[Path | None, typer.Option(help="Split file; only its training cells are taken.")] = None,
    guidance: Weights = None,
    seed: int = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Add generated cells to real ones, more of rare classes."""
    from invirtuo import splits
    from invirtuo.cells.files import read_h5ad

    adata = read_h5ad(data)
    train = None if split is None else splits.from_csv(split, adata.obs)
    growth = {"power": power, "max_fold": max_fold, "min_cells": min_cells}
    options = given(guidance=_guidance(guidance), device=device)
    model = model_with(run, "augment")
    both = model.augment(adata, by, target_size, split=train, seed=seed, progress=not quiet, **growth, **options)
    _write(both, out, quiet)


def correct(
    run: Run,
    data: Cells,
    out: OutCells,
    batch: Annotated[str, typer.Option(help="Covariate whose effect is taken out.")],
    reference: Annotated[
        str | None, typer.Option(help="Batch that cells are brought to; the largest if not given.")
    ] = None,
    guidance: Weights = None,
    invert_with: Annotated[str, typer.Option(help="Labels on the way to noise: own or unconditional.")] = "own",
    invert_guidance: Annotated[
        list[str] | None,
        typer.Option(help="Weights of guidance on the way to noise, as --guidance, which is the way back; 1."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Also decode corrected cells: mean or counts.")] = None,
    steps: RoundTrip = None,
    solver: Solver = None,
    seed: int = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Bring the cells of all batches to one batch."""
    from invirtuo.cells.files import read_h5ad

    inverse = _guidance(invert_guidance, "--invert-guidance")
    options = given(guidance=_guidance(guidance), invert_guidance=inverse, steps=steps, solver=solver, device=device)
    corrected = model_with(run, "correct").correct(
        read_h5ad(data),
        batch,
        reference=reference,
        invert_with=invert_with,
        output=output,
        seed=seed,
        progress=not quiet,
        **options,
    )
    _write(corrected, out, quiet)


def impute(
    run: Run,
    data: Cells,
    out: OutCells,
    masked_fraction: Annotated[float, typer.Option(help="Share of the counts of a cell that is missing.")] = 0.0,
    flow: Annotated[
        bool | None,
        typer.Option(
            "--flow/--no-flow",
            help="By way of noise, as published; slow, and no better. As it is where one of its options is given.",
        ),
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Of the flow: jitter of the noise, 0.05; above 0.1 it becomes another cell.")
    ] = None,
    n_draws: Annotated[int | None, typer.Option(help="Of the flow: jittered copies that are averaged, 10.")] = None,
    steps: RoundTrip = None,
    solver: Solver = None,
    seed: int = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Write the means that the model expects for every entry into the layer "imputed"."""
    from invirtuo.cells.files import read_h5ad

    options = given(noise=noise, n_draws=n_draws, steps=steps, solver=solver, device=device)
    imputed = model_with(run, "impute").impute(
        read_h5ad(data), masked_fraction=masked_fraction, flow=flow, seed=seed, progress=not quiet, **options
    )
    _write(imputed, out, quiet)


def embed(
    run: Run,
    data: Annotated[Path, typer.Argument(help="h5ad file in the data space of the model.")],
    out: OutCells,
    key: Annotated[
        str | None, typer.Option(help="Write the given cells with the embedding in obsm under this key.")
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Encode cells: a file of embeddings, or with --key the given cells with their embedding in obsm."""
    from invirtuo.cells.files import read_h5ad
    from invirtuo.cells.preprocess import with_embedding

    adata = read_h5ad(data)
    embedded = model_with(run, "embed").embed(adata, device=device)
    _write(embedded if key is None else with_embedding(adata, embedded, key), out, quiet)


def _is_finished(out: Path, model: Any, config: Any) -> bool:
    """Whether a saved model has the settings, the labels and the genes of the fit that is asked for."""
    from invirtuo.fit.checkpoint import check_same
    from invirtuo.models import load

    saved = load(out)
    if saved.identity() != model.identity():
        return False
    check_same(saved.card["fit"], config, out)
    return True


def _end_checkpoints(folder: Path, model: Any, config: Any) -> None:
    """Remove the checkpoints of all stages of a fit that ended, unless they are to be kept."""
    from invirtuo.fit import is_main, remove

    if config.keep_checkpoints or not is_main():
        return
    for stage in model.stages(config):
        remove(folder / stage)
    remove(folder)


def _cells(data: list[Path], memory: str | None) -> Any:
    """One file in memory; more of them, a folder, or with a bound of memory, on disk."""
    from invirtuo.cells.files import read_h5ad
    from invirtuo.cells.kinds import is_matrix_folder
    from invirtuo.cells.store import CellStore

    if len(data) == 1 and memory is None and (is_matrix_folder(data[0]) or not data[0].is_dir()):
        return read_h5ad(data[0])
    return CellStore.open(data, memory=memory or "256 MiB")


def _features(sources: list[str], missing: str, unseen: list[str], adata: Any, design: Any) -> Any:
    """The table of sources for the perturbations of the data, and for those that shall be predicted beside them."""
    from invirtuo.cells import features

    if not sources:
        raise ValueError(f"--unseen {unseen[0]} needs --features, by which it is known; see `invirtuo list features`")
    names = [*design.perturbations]
    for word in unseen:
        is_table = Path(word).suffix in (".csv", ".tsv")
        names += read_csv(Path(word), "--unseen").iloc[:, 0].astype(str).tolist() if is_table else [word]
    tables = {source: features.read(source, adata, design) for source in sources}
    return features.join(tables, names, missing=missing)  # type: ignore[arg-type]


def _write(adata: Any, out: Path, quiet: bool) -> None:
    from invirtuo.cells.files import write_h5ad

    write_h5ad(adata, out)
    if not quiet:
        typer.echo(f"{out}: {adata.n_obs:,} cells")


def _guidance(given: list[str] | None, option: str = "--guidance") -> float | dict[str, float] | None:
    """``2`` for all attributes, or ``cell_type=2 donor=1``."""
    if not given:
        return None
    try:
        if len(given) == 1 and "=" not in given[0]:
            return float(given[0])
        return {name: float(value) for name, value in pairs(option, given).items()}
    except ValueError as error:
        raise ValueError(f"{option} {' '.join(given)}: {error}; expected a number, or attribute=number") from error
