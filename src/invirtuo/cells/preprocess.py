"""Checks of a cell matrix, normalisation, gene choice and the knock-down filter: AnnData in, new AnnData out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.checks import check, check_genes
from invirtuo.cells.genes import variable_genes
from invirtuo.cells.pseudotime import pseudotime
from invirtuo.cells.values import (
    canonical_csr,
    check_values,
    log_normalised,
    looks_like_counts,
    matrix,
    require_counts,
    require_log,
)
from invirtuo.errors import preview, whole_number

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = [
    "check",
    "check_genes",
    "check_values",
    "knockdown",
    "looks_like_counts",
    "normalize",
    "perturbench",
    "pseudotime",
    "require_counts",
    "require_log",
    "with_embedding",
]

log = logging.getLogger(__name__)

TOTAL = "total_counts"  # obs column that normalize writes
EMBEDDED = "invirtuo_obsm"  # entry of uns: key of obsm -> the weights that made it


def normalize(
    adata: AnnData,
    *,
    n_genes: int | None = None,
    target_sum: float = 1e4,
    size_factor: str | None = None,
    split: pd.Series | None = None,
    flavor: str = "seurat_v3",
    keep: Sequence[str] = (),
    layer: str | None = None,
) -> AnnData:
    """Log-normalise raw counts and choose genes; a new object, the given one stays as it is.

    Parameters
    ----------
    adata
        Raw counts in X or in `layer`.
    n_genes
        Number of highly variable genes to keep; None keeps all.
    target_sum
        Depth to which each cell is scaled before log1p.
    size_factor
        Column of obs with the depth of each cell, for data that hold only some of the genes. None takes the column
        that :func:`invirtuo.datasets.load` noted for the data set, else the sum over the given genes.
    split
        "train"/"val"/"test" per cell, as made by :mod:`invirtuo.splits`; genes are then chosen on training cells only.
    flavor
        How genes are chosen: "seurat_v3" (on counts), or a flavor of :func:`scanpy.pp.highly_variable_genes` that
        works on log values ("seurat", "cell_ranger").
    keep
        Genes to keep in any case, for example the perturbed ones.

    Returns
    -------
    AnnData with log1p(counts per `target_sum`) in X (CSR, float32), raw counts in ``layers["counts"]``, depth in
    ``obs["total_counts"]``, the choice in ``var["highly_variable"]``; genes stay in their order, other layers are
    left behind.

    Raises
    ------
    ValueError
        If the values are not raw counts, gene names repeat, depths are not positive, or `split` does not fit.

    Examples
    --------
    >>> import invirtuo as iv
    >>> adata = iv.preprocess.normalize(iv.datasets.toy(), n_genes=20, keep=["gene_0"])
    >>> adata.n_vars in (20, 21), "gene_0" in adata.var_names
    (True, True)
    """
    check_genes(adata)
    require_counts(adata, layer=layer)
    check_target_sum(target_sum)
    n_genes = None if n_genes is None else whole_number("n_genes", n_genes)
    size_factor = size_factor or adata.uns.get("invirtuo", {}).get("size_factor")

    # depth and log values over all genes, before any is left out
    wanted = _positions(adata, keep)
    counts = _counts(adata, layer)
    total = _depth(adata.obs, counts, size_factor)
    new = _assemble(adata, counts, log_normalised(counts, total, target_sum), total)
    train = _training_rows(adata, split)
    if n_genes is not None:
        # on training cells alone
        chosen = _variable(new, n_genes, train, flavor)
        new.var["highly_variable"] = chosen
        chosen = chosen.copy()
        chosen[wanted] = True
        new = new[:, chosen].copy()
    new.uns["invirtuo"] |= provenance(target_sum, size_factor, n_genes, flavor, split)
    return new


def provenance(
    target_sum: float, size_factor: str | None, n_genes: int | None, flavor: str, split: pd.Series | None
) -> dict[str, Any]:
    """How values were made, to be noted beside them: choice of genes, depth, and total of a cell."""
    return {
        "genes": "all" if n_genes is None else f"{flavor}, {n_genes}",
        "genes_chosen_on": "all cells" if split is None else "training cells",
        "depth": size_factor or "sum over genes",
        "target_sum": float(target_sum),
    }


def perturbench(
    adata: AnnData,
    design: Design,
    *,
    n_genes: int = 4000,
    degs: int = 25,
    min_cells: int = 10,
    target_sum: float | None = None,
    split: pd.Series | None = None,
) -> AnnData:
    """Prepare raw counts in the order of the PerturBench code [1]_.

    Genes seen in at least `min_cells` cells; scaling to `target_sum`; log1p; `n_genes` highly variable genes
    (seurat_v3 within each covariate group), the `degs` strongest genes of every perturbation and group against
    its control cells (t-test, by absolute score), and the perturbed genes themselves.

    Parameters
    ----------
    adata
        Raw counts in X.
    design
        Which columns mean what.
    n_genes
        Highly variable genes; 0 keeps all genes.
    target_sum
        None for the median depth, as in the code; the text of the paper says 1e4.
    split
        Choose genes on training cells only. Differs: the published choice sees all cells.

    Returns
    -------
    AnnData as from :func:`normalize`, with the chosen genes of each condition in ``uns["rank_genes_groups_cov"]``.
    Differs: genes stay in the order of the file, where the reference's order changes from run to run.

    References
    ----------
    .. [1] Wu et al. 2024, arXiv:2408.10609.
    """
    check_genes(adata)
    require_counts(adata)
    check_target_sum(1.0 if target_sum is None else target_sum)
    n_genes = whole_number("n_genes", n_genes, 0)
    counts = _counts(adata, None)

    # genes seen in enough cells, then depth over these
    seen = np.asarray((counts > 0).sum(axis=0)).ravel() >= min_cells
    counts = counts[:, seen]
    adata = adata[:, seen]
    total = _depth(adata.obs, counts, None)
    depth = float(np.median(total)) if target_sum is None else target_sum
    new = _assemble(adata, counts, log_normalised(counts, total, depth), total)
    new.uns["invirtuo"] |= {"target_sum": depth, "genes": f"perturbench, {n_genes} + {degs}"}
    if n_genes == 0:
        return new
    train = _training_rows(adata, split)

    # variable genes, the strongest responses of every perturbation, and the perturbed genes themselves
    groups = design.groups(new.obs)
    new.var["highly_variable"] = variable_genes(counts[train], n_genes, batch=groups[train])
    ranked = _strongest_genes(new[train], design, degs)
    new.uns["rank_genes_groups_cov"] = ranked
    wanted = set(design.perturbations).union(*ranked.values())
    return new[:, new.var["highly_variable"] | new.var_names.isin(list(wanted))].copy()


def knockdown(
    adata: AnnData,
    design: Design,
    *,
    perturbation_below: float = 0.30,
    cell_below: float = 0.50,
    min_cells: int = 30,
    scale: Literal["linear", "as_is"] = "linear",
    by: Literal["context"] | None = None,
    strict: bool = False,
    gene_names: str | None = None,
    unmeasured: Literal["drop", "keep"] = "drop",
) -> AnnData:
    """Keep the cells in which the knocked-down gene is really down [1]_; for knock-down screens only.

    A perturbation stays if its cells keep at most `perturbation_below` of the expression that control cells have of
    its gene; of these, a cell stays at or below `cell_below`; a perturbation with fewer than `min_cells` cells left
    goes. Control cells always stay.

    Parameters
    ----------
    adata
        log1p of depth-normalised counts.
    design
        Perturbation labels are names of genes.
    unmeasured
        What becomes of labels that are no gene of the data (a panel without the target, drugs, combinations), and so
        cannot be judged: "drop", the published rule, or "keep". They are listed either way.
    scale
        "linear" compares expm1(X), "as_is" compares X itself, as cell-load does.
    by
        None pools the control cells; "context" judges each covariate group by its own control cells.
    strict
        Below instead of at most, as cell-load does.
    gene_names
        Column of var with the names that labels refer to; None for var_names.

    Returns
    -------
    AnnData with the kept cells; ``uns["invirtuo"]["knockdown"]`` says for each perturbation how many cells stay and why
    others went.

    References
    ----------
    .. [1] Adduri et al. 2025, "Predicting cellular responses to perturbation across diverse contexts with State",
       section 5.5.2.
    """
    if unmeasured not in ("drop", "keep"):
        raise ValueError(f"unmeasured is {unmeasured!r}; expected 'drop' or 'keep'")
    if scale == "linear":
        require_log(adata)

    # labels are names of genes; a gene is compared with the controls of its context
    names = pd.Index(adata.var_names if gene_names is None else adata.var[gene_names])
    labels = design.tidy(adata.obs)[design.perturbation].to_numpy()
    is_control = design.is_control(adata.obs)
    contexts = design.groups(adata.obs).to_numpy() if by == "context" else np.full(adata.n_obs, "all")
    kept, rows = is_control.copy(), []
    below = np.less if strict else np.less_equal
    expression = sparse.csc_array(adata.X)
    for context, label in sorted(set(zip(contexts[~is_control], labels[~is_control], strict=True))):
        # perturbed cells, beside the controls of their context
        cells = np.flatnonzero((labels == label) & (contexts == context))
        reference = is_control & (contexts == context)
        # whether a gene is down cannot be said of one that was not measured
        if label not in names:
            stays = unmeasured == "keep"
            kept[cells] = stays
            rows.append((context, label, len(cells), len(cells) * stays, "the label is not a gene of the data"))
            continue
        gene = expression[:, [names.get_loc(label)]].toarray().ravel().astype(np.float64)
        gene = np.expm1(gene) if scale == "linear" else gene
        level = gene[reference].mean() if reference.any() else 0.0
        stay, reason = _knocked_down(gene[cells], level, below, perturbation_below, cell_below, min_cells)
        kept[cells[stay]] = True
        rows.append((context, label, len(cells), int(stay.sum()), reason))

    # what was kept of each perturbation, and why, goes with the cells
    table = pd.DataFrame(rows, columns=["context", "perturbation", "cells", "kept", "reason"])
    if not (table["kept"] > 0).any():
        log.warning("the knock-down filter leaves no perturbation; only the %d control cells remain", is_control.sum())
    new = adata[kept].copy()
    new.uns["invirtuo"] = copy.deepcopy(dict(adata.uns.get("invirtuo", {}))) | {"knockdown": table}
    return new


def _knocked_down(
    gene: np.ndarray, level: float, below: np.ufunc, perturbation_below: float, cell_below: float, min_cells: int
) -> tuple[np.ndarray, str]:
    """Which cells of one perturbation stay, and why the others do not."""
    nobody = np.zeros(len(gene), dtype=bool)
    if level <= 0:
        return nobody, "the gene is silent in the control cells"
    remaining = gene.mean() / level
    if not below(remaining, perturbation_below):
        return nobody, f"{remaining:.2f} of the control expression remains"
    stay = below(gene / level, cell_below)
    if stay.sum() < min_cells:
        return nobody, f"only {int(stay.sum())} cells are knocked down"
    return stay, ""


def _counts(adata: AnnData, layer: str | None) -> sparse.csr_matrix:
    """The counts in memory; of the old sparse class, which AnnData of all versions keeps as it is."""
    return canonical_csr(matrix(adata, layer)[:], np.float32)


def _depth(obs: pd.DataFrame, counts: sparse.csr_matrix, column: str | None) -> np.ndarray:
    if column is None:
        total = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    elif column in obs:
        total = pd.to_numeric(obs[column], errors="coerce").to_numpy(np.float64)
    else:
        raise ValueError(f"size_factor: column {column!r} is not in obs; found {preview(obs.columns, 12)}")
    bad = int((~(np.isfinite(total) & (total > 0))).sum())
    if bad:
        source = "no counts at all" if column is None else f"a depth obs[{column!r}] that is not a number above 0"
        raise ValueError(f"{bad} cells have {source}; remove them, for example with scanpy.pp.filter_cells")
    return total


def check_target_sum(target_sum: float) -> None:
    """Raise ValueError unless cells can be brought to that depth."""
    if not (np.isfinite(target_sum) and target_sum > 0):
        raise ValueError(f"target_sum is {target_sum}; expected a finite number above 0, for example 1e4")


def _assemble(adata: AnnData, counts: sparse.csr_matrix, log_expr: sparse.csr_matrix, total: np.ndarray) -> AnnData:
    """Build the new object: log values in X, counts in a layer; annotations copied, other layers left behind."""
    from anndata import AnnData

    obs = adata.obs.copy()
    var = adata.var.copy()
    obsm = {name: value.copy() for name, value in adata.obsm.items()}
    uns = copy.deepcopy(dict(adata.uns))
    new = AnnData(X=log_expr, obs=obs, var=var, layers={"counts": counts}, obsm=obsm, uns=uns)
    new.obs[TOTAL] = total
    new.uns["invirtuo"] = dict(new.uns.get("invirtuo", {})) | {"size_factor": TOTAL}
    return new


def _training_rows(adata: AnnData, split: pd.Series | None) -> np.ndarray:
    if split is None:
        return np.ones(adata.n_obs, dtype=bool)
    if len(split) != adata.n_obs or not pd.Index(split.index).equals(adata.obs_names):
        raise ValueError(
            f"split has {len(split)} entries with other names than the {adata.n_obs} cells; make it from adata.obs of "
            "the same object"
        )
    train: np.ndarray = (split == "train").to_numpy()
    if not train.any():
        raise ValueError(f"split holds no 'train' cells; found {preview(sorted(map(str, split.unique())))}")
    return train


def _positions(adata: AnnData, genes: Sequence[str]) -> np.ndarray:
    genes = [genes] if isinstance(genes, str) else list(genes)
    positions: np.ndarray = adata.var_names.get_indexer(genes)
    missing = [gene for gene, position in zip(genes, positions, strict=True) if position < 0]
    if missing:
        raise ValueError(f"keep: {len(missing)} genes are not in the data: {preview(missing)}")
    return positions


def with_embedding(adata: AnnData, embedded: AnnData, key: str = "X_state") -> AnnData:
    """Put an embedding of cells beside their expression.

    Parameters
    ----------
    adata
        Cells; a copy is returned.
    embedded
        What ``model.embed(adata)`` gave, the same cells in the same order.
    key
        Entry of obsm.

    Returns
    -------
    AnnData with ``obsm[key]``, and in ``uns["invirtuo_obsm"][key]`` which weights made it.

    Raises
    ------
    ValueError
        If the cells are not the same.
    """
    if not adata.obs_names.equals(embedded.obs_names):
        raise ValueError(
            f"the embedding has {embedded.n_obs} cells that are not the {adata.n_obs} given ones in their order; embed "
            "these cells"
        )
    new = adata.copy()
    new.obsm[key] = np.asarray(embedded.X, np.float32)
    made_by = embedded.uns.get("invirtuo", {}).get("checkpoint", "")
    new.uns[EMBEDDED] = {**new.uns.get(EMBEDDED, {}), key: made_by}
    return new


def _variable(new: AnnData, n_genes: int, train: np.ndarray, flavor: str) -> np.ndarray:
    if flavor == "seurat_v3":
        return variable_genes(new.layers["counts"][train], n_genes)
    if flavor not in ("seurat", "cell_ranger"):
        raise ValueError(f"flavor is {flavor!r}; expected 'seurat_v3', 'seurat' or 'cell_ranger'")
    from scanpy.preprocessing import highly_variable_genes

    n_genes = min(n_genes, new.n_vars)
    table = highly_variable_genes(new[train].copy(), n_top_genes=n_genes, flavor=flavor, inplace=False)
    chosen: np.ndarray = table["highly_variable"].to_numpy()
    return chosen


def _strongest_genes(adata: AnnData, design: Design, n: int) -> dict[str, list[str]]:
    """Genes with the largest absolute t against the control of the group, keyed ``<group>_<perturbation>``."""
    from scanpy.get import rank_genes_groups_df
    from scanpy.tools import rank_genes_groups

    found: dict[str, list[str]] = {}
    groups = design.groups(adata.obs)
    for group in sorted(groups.unique()):
        cells = adata[(groups == group).to_numpy()].copy()
        cells.obs[design.perturbation] = design.tidy(cells.obs)[design.perturbation].astype("category")
        # a t-test needs two cells on both sides
        sizes = cells.obs[design.perturbation].value_counts()
        labels = sorted(label for label, size in sizes.items() if size > 1 and label != design.control)
        if sizes.get(design.control, 0) < 2 or not labels:
            log.warning("no differential genes for %s: it needs two control and two perturbed cells", group)
            continue
        rank_genes_groups(
            cells,
            design.perturbation,
            groups=labels,
            reference=design.control,
            method="t-test",
            rankby_abs=True,
            n_genes=n,
        )
        prefix = group.replace("|", "_")
        found |= {f"{prefix}_{label}": list(rank_genes_groups_df(cells, label)["names"]) for label in labels}
    return found
