"""Predictions for the Virtual Cell Challenge 2026 from a fitted model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invirtuo.cells.files import read_h5ad
from invirtuo.cells.preprocess import normalize
from invirtuo.cells.values import looks_like_counts
from invirtuo.errors import preview
from invirtuo.metrics.challenge.submission import CONTROL, Contract, Submission, pack_submission

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.verbs.predict import PerturbationModel

__all__ = ["predict_submission"]

COLUMNS = ("target_gene", "context")  # of the files of the challenge


def predict_submission(
    model: PerturbationModel,
    controls: AnnData | str | Path,
    contract: Contract,
    out: str | Path,
    **options: Any,
) -> Submission:
    """Predict what a contract asks for, as counts, into the file that the challenge takes.

    Memory holds the model, its control cells and some thousand cells, however many are asked for.

    Parameters
    ----------
    model
        Fitted to log1p values of all genes of the contract, its Design with one covariate: the context.
    controls
        Control cells of the contexts: raw counts or log1p of them; columns as in the Design of the model, or as in the
        files of the challenge (`target_gene`, `context`, "non-targeting").
    contract
        Genes, and the perturbations and cells of each context; see `invirtuo.metrics.read_contract`.
    out
        h5ad to write, or ``.vcc``.
    options
        Of ``PerturbationModel.predict``: seed, device, progress and those of the model.

    Returns
    -------
    Submission
        What is in the file.

    Raises
    ------
    ValueError
        If the model lacks genes, perturbations or contexts that are asked for, or what it predicts does not fit.
    """
    design = model.design
    if len(design.covariates) != 1 or design.dose or design.time:
        raise ValueError(
            f"the design of {model.name} has the columns {preview(design.columns)}; expected the perturbation and one "
            "covariate, the context"
        )
    if lacking := sorted(set(contract.genes) - set(model.genes)):
        raise ValueError(
            f"{model.name} lacks {len(lacking):,} of the {len(contract.genes):,} genes that are asked for: "
            f"{preview(lacking)}; fit it to data with all of them"
        )
    (context,) = design.covariates
    cells = read_h5ad(controls) if isinstance(controls, str | Path) else controls.copy()
    names = dict(zip(COLUMNS, (design.perturbation, context), strict=True))
    cells.obs = cells.obs.rename(columns={own: name for own, name in names.items() if name not in cells.obs})
    if design.perturbation in cells.obs:
        labels = cells.obs[design.perturbation].astype(str)
        cells.obs[design.perturbation] = labels.replace({CONTROL: design.control})
    if looks_like_counts(cells.X):
        cells = normalize(cells)

    table = contract.conditions(context, str(design.perturbation))
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as folder:
        drawn = Path(folder) / "predicted.h5ad"
        conditions, sizes = table.drop(columns="n_cells"), table["n_cells"].tolist()
        predicted = model.predict(conditions, sizes, controls=cells, output="counts", out=drawn, **options)
        predicted.file.close()
        return pack_submission(drawn, out, contract, perturbation=str(design.perturbation), context=context)
