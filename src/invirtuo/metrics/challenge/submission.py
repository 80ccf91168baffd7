"""The file that the Virtual Cell Challenge 2026 takes: whether one fits its contract, and one that does.

The contract is that of vcc-cli 0.3.0, whose ``vcc prep`` checks and packs for the upload.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.files import append_rows, read_h5ad, writing, writing_h5ad
from invirtuo.errors import preview
from invirtuo.metrics.challenge.panel import FRACTION, MAX_DEPTH

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Contract", "Submission", "check_submission", "pack_submission", "read_contract"]

N_GENES = 18_533  # of the challenge; another number is a note
N_CELLS = 400  # of each perturbation in each context
MAX_CELLS, MAX_STORED = 400_000, 4_750_000_000
CONTROL = "non-targeting"
HEADERS = ("gene_name", "gene", "gene_symbol", "gene_names", "genes")
BLOCK = 2_000  # cells in memory at a time


@dataclass(frozen=True)
class Contract:
    """What a submission has to hold.

    Parameters
    ----------
    genes
        Names, in the order of the file.
    n_cells
        Context to perturbation to the number of its cells.
    """

    genes: tuple[str, ...]
    n_cells: Mapping[str, Mapping[str, int]]

    @property
    def perturbations(self) -> list[str]:
        """All of them, sorted."""
        return sorted(set().union(*self.n_cells.values()))

    def conditions(self, context: str = "context", perturbation: str = "target_gene") -> pd.DataFrame:
        """A row for each perturbation in each context, with its number of cells in `n_cells`."""
        rows = [(name, label, n) for name, wanted in self.n_cells.items() for label, n in wanted.items()]
        return pd.DataFrame(rows, columns=[context, perturbation, "n_cells"])


@dataclass
class Submission:
    """What was found in a file: `problems` for which it is refused, `notes` for what is put right, and facts."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_accepted(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def read_contract(
    genes: str | Path, perturbations: str | Path, contexts: Sequence[str] = ("A", "B", "C"), n_cells: int = N_CELLS
) -> Contract:
    """The contract from the files of the challenge.

    Parameters
    ----------
    genes
        ``gene_names.csv``: names in the first column, with or without a header.
    perturbations
        ``pert_counts.csv``: column `target_gene`; optional `context` and `n_cells`.
    contexts
        Labels of the contexts, where the file has none.
    n_cells
        Cells of each perturbation in each context, where the file has none.

    Raises
    ------
    ValueError
        If a file cannot be read, names repeat, or the column is missing.
    """
    names = _table(genes, header=None).iloc[:, 0].str.strip().tolist()
    names = names[1:] if names[0].lower() in HEADERS else names
    if len(set(names)) < len(names):
        repeated = pd.Series(names)[pd.Series(names).duplicated()]
        raise ValueError(f"{genes} names {preview(repeated.unique())} more than once; expected each gene once")
    table = _table(perturbations)
    if "target_gene" not in table:
        raise ValueError(f"{perturbations} has the columns {preview(table.columns)}; expected target_gene")
    sizes = pd.to_numeric(table.get("n_cells", n_cells), errors="coerce")
    table["n_cells"] = sizes
    if not (table["n_cells"] >= 1).all() or (table["n_cells"] % 1).any():
        raise ValueError(f"{perturbations} has numbers of cells that are no whole numbers above 0 in n_cells")
    if "context" not in table:
        table = pd.concat([table.assign(context=context) for context in contexts])
    wanted: dict[str, dict[str, int]] = {}
    for context, label, n in zip(table["context"], table["target_gene"], table["n_cells"], strict=True):
        wanted.setdefault(str(context), {})[label] = int(n)
    return Contract(tuple(names), wanted)


def _table(path: str | Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, **options)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV table: {error}") from error


# ---- checking --------------------------------------------------------------------------------------------------------


def check_submission(
    cells: AnnData | str | Path,
    contract: Contract,
    *,
    perturbation: str = "target_gene",
    context: str = "context",
    max_cells: int = MAX_CELLS,
    max_stored: int = MAX_STORED,
) -> Submission:
    """Look for everything for which the challenge would refuse a file.

    Parameters
    ----------
    cells
        Predicted cells, or their h5ad, which is read in pieces.
    contract
        What has to be there.
    perturbation, context
        Columns of obs.
    max_cells, max_stored
        Bounds on cells and stored values.

    Raises
    ------
    ValueError
        If the file cannot be read at all.
    """
    adata = read_h5ad(cells, backed=True) if isinstance(cells, str | Path) else cells
    found = Submission(facts={"n_obs": adata.n_obs, "n_vars": adata.n_vars})
    if not adata.n_obs:
        found.problems.append("there are no cells")
        return found
    _check_genes(adata, contract, found)
    _check_labels(adata, contract, perturbation, context, found)
    if adata.n_obs > max_cells:
        found.problems.append(f"{adata.n_obs:,} cells; expected at most {max_cells:,}")
    _check_values(adata, perturbation, max_stored, found)
    dropped = [f"{part}[{key}]" for part in ("layers", "obsm", "varm", "obsp", "uns") for key in getattr(adata, part)]
    if dropped:
        found.notes.append(f"left out: {', '.join(dropped)}")
    return found


def _check_genes(adata: AnnData, contract: Contract, found: Submission) -> None:
    names = adata.var_names.astype(str)
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        found.problems.append(f"genes that are there more than once: {preview(repeated)}")
        return
    if difference := _difference(names, contract.genes):
        found.problems.append(f"genes differ from the list: {difference}")
    elif tuple(names) != contract.genes:
        found.notes.append("genes are in another order, which is put right")
    if len(contract.genes) != N_GENES:
        found.notes.append(f"the list has {len(contract.genes):,} genes, where the challenge has {N_GENES:,}")


def _check_labels(adata: AnnData, contract: Contract, perturbation: str, context: str, found: Submission) -> None:
    if missing := [column for column in (perturbation, context) if column not in adata.obs]:
        found.problems.append(f"obs has no column {' and '.join(missing)}; found {preview(adata.obs.columns)}")
        return
    labels, contexts = adata.obs[perturbation].astype(str), adata.obs[context].astype(str)
    if n_controls := int((labels == CONTROL).sum()):
        found.problems.append(f"{n_controls:,} cells labelled {CONTROL}; expected no control cells")
    if unknown := sorted(set(contexts) - set(contract.n_cells)):
        found.problems.append(f"unknown contexts {preview(unknown)}; expected {preview(contract.n_cells)}")
    if lacking := sorted(set(contract.n_cells) - set(contexts)):
        found.problems.append(f"no cells of the contexts {preview(lacking)}")
    for name in [name for name in contract.n_cells if name not in lacking]:
        counts = labels[(contexts == name) & (labels != CONTROL)].value_counts()
        wanted = pd.Series(contract.n_cells[name])
        if difference := _difference(counts.index, wanted.index):
            found.problems.append(f"context {name}: perturbations differ from the list: {difference}")
            continue
        wrong = wanted.index[counts.reindex(wanted.index) != wanted]
        if len(wrong):
            first = wrong[0]
            found.problems.append(
                f"context {name}: {len(wrong)} perturbations have another number of cells than expected: {first} has "
                f"{counts[first]}, expected {wanted[first]}"
            )


def _difference(found: Iterable[str], wanted: Iterable[str]) -> str:
    """What is missing and what is further; empty if nothing is."""
    found, wanted = set(found), set(wanted)
    lacking, further = sorted(wanted - found), sorted(found - wanted)
    if not lacking and not further:
        return ""
    return f"{len(lacking)} missing ({preview(lacking)}), {len(further)} further ({preview(further)})"


def _check_values(adata: AnnData, perturbation: str, max_stored: int, found: Submission) -> None:
    """Counts in every cell, something in every perturbation; one pass."""
    labels = adata.obs[perturbation].astype(str) if perturbation in adata.obs else pd.Series("", adata.obs_names)
    expressed: set[str] = set()
    n_stored, bad = 0, {"NaN or infinite": 0, "negative": 0, "no whole numbers": 0}
    deepest, worst = 0.0, -1
    for start, block in blocks(adata):
        values = block.data
        n_stored += len(values)
        finite = np.isfinite(values)
        bad["NaN or infinite"] += int((~finite).sum())
        values = values[finite]
        bad["negative"] += int((values < 0).sum())
        off = np.abs(values - np.rint(values))
        bad["no whole numbers"] += int((off > FRACTION).sum())
        total = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
        if np.nanmax(total) > deepest:
            deepest, worst = float(np.nanmax(total)), start + int(np.nanargmax(total))
        expressed |= set(labels.iloc[start : start + len(total)][total != 0])
    found.facts["nnz"] = n_stored
    found.problems += [f"{n:,} values are {what}; expected raw counts" for what, n in bad.items() if n]
    if n_stored > max_stored:
        found.problems.append(f"{n_stored:,} stored values; expected at most {max_stored:,}")
    if deepest > MAX_DEPTH and not bad["NaN or infinite"]:
        found.problems.append(f"cell {worst} has {deepest:,.0f} counts; expected at most {MAX_DEPTH:,.0f} in a cell")
    if empty := sorted(set(labels) - expressed):
        found.problems.append(f"perturbations without a count in any cell: {preview(empty)}")


def blocks(adata: AnnData) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """First row and values of so many cells at a time; zeros are not stored."""
    for start in range(0, adata.n_obs, BLOCK):
        block = sparse.csr_matrix(adata[start : start + BLOCK].to_memory().X)
        block.sum_duplicates()
        block.eliminate_zeros()
        yield start, block


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack_submission(
    cells: AnnData | str | Path,
    out: str | Path,
    contract: Contract,
    *,
    perturbation: str = "target_gene",
    context: str = "context",
) -> Submission:
    """Write predicted cells as the challenge takes them, if they fit its contract.

    Parameters
    ----------
    cells, contract, perturbation, context
        As in :func:`check_submission`.
    out
        ``.h5ad``, which ``vcc prep`` takes; or ``.vcc``, what it makes of it (needs zstandard).

    Raises
    ------
    ValueError
        If the cells do not fit the contract: all problems. Nothing is written then.
    """
    out = Path(out)
    if out.suffix not in (".h5ad", ".vcc"):
        raise ValueError(f"out is {out}; expected a name that ends in .h5ad or .vcc")
    found = check_submission(cells, contract, perturbation=perturbation, context=context)
    if found.problems:
        raise ValueError(f"{len(found.problems)} problems: {'; '.join(found.problems)}")
    adata = read_h5ad(cells, backed=True) if isinstance(cells, str | Path) else cells
    obs = adata.obs[[perturbation, context]].astype(str).astype("category")
    obs.columns, obs.index = ["target_gene", "context"], pd.RangeIndex(adata.n_obs).astype(str)
    if out.suffix == ".h5ad":
        _write(adata, obs, out, contract)
        return found
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain = Path(folder) / "pred.h5ad"
        _write(adata, obs, plain, contract)
        _archive(plain, out, contract, found.facts)
    return found


def _write(adata: AnnData, obs: pd.DataFrame, out: Path, contract: Contract) -> None:
    """Labels and counts alone, genes in the order of the list, block by block."""
    order = adata.var_names.astype(str).get_indexer(list(contract.genes))
    with writing_h5ad(out, obs, pd.DataFrame(index=pd.Index(contract.genes)), {}) as file:
        for _, block in blocks(adata):
            counts = block[:, order].astype(np.float32)
            counts.sort_indices()
            append_rows(file, counts)


def _archive(plain: Path, out: Path, contract: Contract, facts: Mapping[str, int]) -> None:
    """meta.json and the compressed h5ad, in a tar."""
    try:
        import zstandard
    except ImportError as error:
        raise ValueError("a .vcc file needs the package zstandard: pip install 'invirtuo[vcc]'") from error
    names = "\n".join(contract.perturbations)
    digest = hashlib.sha256(names.encode()).hexdigest()
    about_file = {"cli_version": f"invirtuo {version('invirtuo')}", "contexts": list(contract.n_cells), "schema": 1}
    meta = {**about_file, **facts, "perts_fingerprint": f"sha256:{digest}"}
    packed = plain.with_suffix(".h5ad.zst")
    with plain.open("rb") as source, packed.open("wb") as target:
        zstandard.ZstdCompressor(level=3).copy_stream(source, target)
    with writing(out) as unfinished, tarfile.open(unfinished, "w") as archive:
        text = json.dumps(meta, sort_keys=True).encode()
        about = tarfile.TarInfo("meta.json")
        about.size = len(text)
        archive.addfile(about, io.BytesIO(text))
        about = tarfile.TarInfo("pred.h5ad.zst")
        about.size = packed.stat().st_size
        with packed.open("rb") as source:
            archive.addfile(about, source)
