"""What is known of perturbations before any is measured: a table of numbers, from files and from builders.

A table has a row for every perturbation (or gene, or drug), named by the index. :func:`join` puts tables side by side
for the perturbations that a model shall know; the result is `features` of :meth:`invirtuo.Design.from_adata`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.genes import delimited, read_table
from invirtuo.cells.gmt import read_gmt
from invirtuo.errors import preview

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.cells.store import CellStore
    from invirtuo.design import Design

__all__ = ["SOURCES", "coexpression", "fingerprints", "gene_sets", "join", "read", "read_table"]

logger = logging.getLogger(__name__)

WIDTH = 50  # columns of a source that is wider are its leading components
BITS, RADIUS = 2048, 2  # of Morgan fingerprints
SMILES = "smiles"  # column of molecules

SOURCES = {
    "FILE.csv, .tsv, .parquet": "a row of numbers for each perturbation, named in the first column",
    "FILE.npz": "arrays `genes` (names) and `emb` (one row each), as gene2vec is shipped",
    "FILE.pt": "a mapping of name to vector, as embeddings of proteins are shipped; read without running code",
    "FILE.gmt, .gmt.gz": "sets of genes (GO terms, pathways): components of the sets that a gene is in",
    "FILE.csv with a column smiles": "molecules: components of their Morgan fingerprints (needs rdkit)",
    "coexpression": "components of the genes in the control cells of the data; for perturbations that are genes",
}


# ---- one source ------------------------------------------------------------------------------------------------------


def gene_sets(path: str | Path, *, n_components: int = WIDTH, smallest: int = 5, largest: int = 500) -> pd.DataFrame:
    """Components of the sets that genes belong to, from a .gmt file (GO terms, pathways).

    Sets weigh by the logarithm of their rarity, and genes have length 1, however many sets they are in.

    Parameters
    ----------
    path
        .gmt or .gmt.gz: name, description and genes of a set in each line, separated by tabs.
    n_components
        Columns of the table.
    smallest, largest
        Sets of other sizes are left out.

    Returns
    -------
    (genes, n_components)

    Raises
    ------
    ValueError
        If the file cannot be read or no set is left.
    """
    from sklearn.preprocessing import normalize

    sets = list(read_gmt(path, smallest=smallest, largest=largest).values())
    names = sorted(set().union(*sets))
    place = {name: i for i, name in enumerate(names)}
    rows = [place[gene] for genes in sets for gene in genes]
    columns = np.repeat(np.arange(len(sets)), [len(genes) for genes in sets])
    member = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(names), len(sets)))
    rarity = np.log(len(names) / np.asarray(member.sum(axis=0)).ravel())
    weighted = normalize(member.multiply(rarity).tocsr())
    return pd.DataFrame(_components(weighted, n_components), index=names)


def coexpression(
    adata: AnnData | CellStore, design: Design, *, n_components: int = WIDTH, largest: int = 20_000
) -> pd.DataFrame:
    """Components of genes in control cells: genes that go together are near each other.

    Parameters
    ----------
    adata
        log1p values. Held-out conditions play no part, as only control cells do.
    design
        Says which cells are controls.
    n_components
        Columns of the table.
    largest
        Most control cells that are looked at, drawn at random.

    Returns
    -------
    (genes, n_components): loadings of genes of unit variance, times the singular values.

    Raises
    ------
    ValueError
        If there are fewer than two control cells.
    """
    rows = np.flatnonzero(design.is_control(adata.obs))
    if len(rows) < 2:
        raise ValueError(f"coexpression needs control cells, and {len(rows)} are labelled {design.control!r}")
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:largest])
    x = CellDataset(adata, design).source.read(rows).toarray().astype(np.float64)
    scaled = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6)
    return pd.DataFrame(_components(scaled.T, n_components), index=adata.var_names.astype(str))


def fingerprints(smiles: Mapping[str, str], *, n_components: int = WIDTH) -> pd.DataFrame:
    """Components of Morgan fingerprints of molecules.

    Parameters
    ----------
    smiles
        Name of each molecule to its SMILES.
    n_components
        Columns of the table.

    Returns
    -------
    (molecules, n_components), of fingerprints of length 1, so that their products are near Tanimoto similarities.

    Raises
    ------
    ValueError
        If rdkit is not installed, or a molecule cannot be read.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError as error:
        raise ValueError("molecules need the package rdkit: pip install 'invirtuo[molecules]'") from error
    made = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    with rdBase.BlockLogs():  # what cannot be read is an error below
        molecules = {name: Chem.MolFromSmiles(str(text)) for name, text in smiles.items()}
    if unread := [name for name, molecule in molecules.items() if molecule is None]:
        raise ValueError(f"{SMILES}: {preview(unread)} cannot be read as molecules; expected SMILES like CC(=O)O")
    bits = np.stack([made.GetFingerprintAsNumPy(molecule) for molecule in molecules.values()]).astype(float)
    bits /= np.maximum(np.linalg.norm(bits, axis=1, keepdims=True), 1.0)
    return pd.DataFrame(_components(bits, n_components), index=list(molecules))


def _components(rows: Any, n_components: int) -> np.ndarray:
    """Leading left singular vectors times values, (n, k); their inner products are near those of the rows."""
    from sklearn.decomposition import TruncatedSVD

    k = min(n_components, min(rows.shape) - 1)
    if k < 1:
        return np.asarray(rows.toarray() if sparse.issparse(rows) else rows)
    components: np.ndarray = TruncatedSVD(k, random_state=0, n_iter=7).fit_transform(rows)
    return components


# ---- several, for the perturbations of a design ----------------------------------------------------------------------


def read(source: str | Path, adata: AnnData | CellStore, design: Design) -> pd.DataFrame:
    """The table of a source that is named as in `SOURCES`."""
    text = str(source)
    if text == "coexpression":
        return coexpression(adata, design)
    if text.endswith((".gmt", ".gmt.gz")):
        return gene_sets(text)
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"features: {text!r} is no file; expected one, or coexpression; see `invirtuo list features`")
    if path.suffix in (".csv", ".tsv"):
        if SMILES in delimited(path, nrows=0):
            molecules = delimited(path, dtype=str)
            return fingerprints(dict(zip(molecules.index.astype(str), molecules[SMILES], strict=True)))
    return read_table(path)


def join(
    tables: Mapping[str, pd.DataFrame] | Sequence[pd.DataFrame],
    names: Sequence[str],
    *,
    missing: Literal["error", "mean"] = "error",
    width: int = WIDTH,
) -> pd.DataFrame:
    """Tables of several sources side by side, for given perturbations, each source with the same weight.

    Parameters
    ----------
    tables
        Tables of vectors; as a mapping, with names for messages.
    names
        Perturbations: those of the data, and those that shall be predicted beside them.
    missing
        Perturbations that a source lacks: "error", or "mean": they have the mean of its vectors, and a warning says
        which.
    width
        Wider sources are cut to so many components.

    Returns
    -------
    (names, columns): columns of each source centred over the names that it has, and scaled to vectors of mean squared
    length 1, as one-hots have.

    Raises
    ------
    ValueError
        If a source lacks names, or has numbers that are not finite.
    """
    if missing not in ("error", "mean"):
        raise ValueError(f"missing is {missing!r}; expected error or mean")
    if not isinstance(tables, Mapping):
        tables = {f"source {i}": table for i, table in enumerate(tables, start=1)}
    wanted = list(dict.fromkeys(map(str, names)))
    blocks = []
    for title, table in tables.items():
        present = [name for name in wanted if name in table.index]
        lacking = [name for name in wanted if name not in table.index]
        known = table.loc[present].to_numpy(np.float64)
        if not len(known) or (lacking and missing == "error"):
            raise ValueError(
                f"features: {title} lacks {len(lacking)} of {len(wanted)} perturbations: {preview(lacking)}; it has "
                f"{preview(table.index)}. Add them, or give them its mean (missing='mean', --features-missing mean)"
            )
        if not np.isfinite(known).all():
            raise ValueError(f"features: {title} holds missing values or infinity; expected finite numbers")
        if lacking:
            logger.warning("features: %s lacks %s, which get its mean", title, preview(lacking))
        centred = known - known.mean(axis=0)
        if centred.shape[1] > width:
            centred = _components(centred, width)
        centred /= max(np.sqrt(np.square(centred).sum(axis=1).mean()), 1e-12)
        block = pd.DataFrame(centred, index=present).add_prefix(f"{title} ")
        blocks.append(block.reindex(wanted, fill_value=0.0))
    return pd.concat(blocks, axis=1)
