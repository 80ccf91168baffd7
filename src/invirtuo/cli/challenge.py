"""Verbs of the Virtual Cell Challenge 2026: predict what it asks for, check a file, pack it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invirtuo.cli.options import Cells, Device, Out, Quiet, Run, fail, given, model_with

if TYPE_CHECKING:
    from invirtuo.metrics import Submission

Genes = Annotated[Path, typer.Option("--genes", help="gene_names.csv of the challenge.")]
Wanted = Annotated[
    Path, typer.Option("--perturbations", help="pert_counts.csv: target_gene, and if needed context and n_cells.")
]
Contexts = Annotated[str, typer.Option("--contexts", help="Labels of the contexts, joined by commas.")]
NCells = Annotated[int, typer.Option("-n", "--n-cells", help="Cells of each perturbation in each context.")]
Perturbation = Annotated[str, typer.Option("--perturbation", help="Column of obs with the perturbations.")]
Context = Annotated[str, typer.Option("--context", help="Column of obs with the contexts.")]


def predict(
    run: Run,
    controls: Annotated[Path, typer.Option("--controls", help="h5ad with control cells of the contexts.")],
    genes: Genes,
    perturbations: Wanted,
    out: Out,
    contexts: Contexts = "A,B,C",
    n_cells: NCells = 400,
    seed: int = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Predict what the challenge asks for from a fitted model, as counts in the file that it takes."""
    from invirtuo.bench import predict_submission
    from invirtuo.metrics import read_contract

    contract = read_contract(genes, perturbations, contexts.split(","), n_cells)
    options = given(device=device)
    found = predict_submission(
        model_with(run, "predict"), controls, contract, out, seed=seed, progress=not quiet, **options
    )
    _say(out, found, quiet)


def check(
    cells: Cells,
    genes: Genes,
    perturbations: Wanted,
    contexts: Contexts = "A,B,C",
    n_cells: NCells = 400,
    perturbation: Perturbation = "target_gene",
    context: Context = "context",
) -> None:
    """Say whether the challenge would take a file, and all that is wrong with it; exit code 2 if it would not."""
    from invirtuo.metrics import check_submission, read_contract

    contract = read_contract(genes, perturbations, contexts.split(","), n_cells)
    found = check_submission(cells, contract, perturbation=perturbation, context=context)
    for problem in found.problems:
        typer.echo(f"problem: {problem}")
    if found.problems:
        fail(f"{cells} does not fit the challenge: {len(found.problems)} problems")
    _say(cells, found, quiet=False)


def pack(
    cells: Cells,
    genes: Genes,
    perturbations: Wanted,
    out: Out,
    contexts: Contexts = "A,B,C",
    n_cells: NCells = 400,
    perturbation: Perturbation = "target_gene",
    context: Context = "context",
    quiet: Quiet = False,
) -> None:
    """Write predicted counts as the challenge takes them: .h5ad for `vcc prep`, or .vcc."""
    from invirtuo.metrics import pack_submission, read_contract

    contract = read_contract(genes, perturbations, contexts.split(","), n_cells)
    _say(out, pack_submission(cells, out, contract, perturbation=perturbation, context=context), quiet)


def _say(path: Path, found: Submission, quiet: bool) -> None:
    """What is in a file that fits, and what was put right."""
    if quiet:
        return
    for note in found.notes:
        typer.echo(f"note: {note}")
    facts = found.facts
    typer.echo(f"{path}: fits; {facts['n_obs']:,} cells, {facts['n_vars']:,} genes, {facts['nnz']:,} counts above 0")
