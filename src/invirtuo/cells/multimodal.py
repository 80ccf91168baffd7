"""RNA and chromatin of the same cells as one matrix: genes first, then peaks, whose names begin with ``atac:``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["PEAK", "join", "part"]

logger = logging.getLogger(__name__)

PEAK = "atac:"  # begin of the names of peaks


def join(data: Any, *, rna: str | None = "rna", atac: str = "atac", obs: str | None = None) -> AnnData:
    """Put genes and peaks of the same cells beside each other; peaks become 0 or 1.

    Parameters
    ----------
    data
        MuData, or a mapping of modality to AnnData.
    rna, atac
        Names of the modalities; ``rna=None`` for chromatin alone.
    obs
        Modality whose obs is kept; None takes that of the first.

    Returns
    -------
    AnnData, CSR, with the counts of genes and then the peaks, and ``var["modality"]``.

    Raises
    ------
    ValueError
        If a modality is missing, or the modalities do not hold the same cells.
    """
    import anndata

    modalities: Mapping[str, AnnData] = getattr(data, "mod", data)
    wanted = [name for name in (rna, atac) if name is not None]
    if missing := [name for name in wanted if name not in modalities]:
        raise ValueError(f"there is no modality {missing[0]!r}; found {', '.join(modalities)}")
    first = modalities[wanted[0]]
    for name in wanted:
        if not modalities[name].obs_names.is_unique:
            raise ValueError(f"cell names of {name!r} repeat; call obs_names_make_unique() on both modalities alike")
    other = modalities[atac]
    if set(other.obs_names) != set(first.obs_names) or other.n_obs != first.n_obs:
        raise ValueError(f"{wanted[0]!r} and {atac!r} do not hold the same cells; keep those that both have")
    blocks = [] if rna is None else [sparse.csr_matrix(first.X)]
    peaks = sparse.csr_matrix(modalities[atac][first.obs_names].X, copy=True)
    if peaks.nnz and peaks.data.max() > 1:
        logger.warning("peaks hold counts; they are read as open (above 0) or closed")

    # open or closed
    peaks.sum_duplicates()
    peaks.data = (peaks.data > 0).astype(peaks.dtype)

    # genes first, then peaks, in the order of cells of the first modality
    gene_names = [] if rna is None else [str(name) for name in first.var_names]
    peak_names = [f"{PEAK}{name}" for name in modalities[atac].var_names]
    modality = ["rna"] * len(gene_names) + ["atac"] * len(peak_names)
    var = pd.DataFrame({"modality": modality}, index=pd.Index([*gene_names, *peak_names]))
    x = sparse.hstack([*blocks, peaks], format="csr")
    x.eliminate_zeros()
    table = modalities[obs or wanted[0]][first.obs_names].obs.copy()
    return anndata.AnnData(x.astype(np.float32), obs=table, var=var)


def part(adata: AnnData) -> Any:
    """Take joined (or generated) cells apart again: a MuData with the modalities "rna" and "atac".

    Needs the extra ``invirtuo[multimodal]``.
    """
    try:
        import mudata
    except ImportError as error:
        raise ValueError('taking modalities apart needs mudata; pip install "invirtuo[multimodal]"') from error
    is_peak = adata.var_names.str.startswith(PEAK)
    modalities = {"rna": adata[:, ~is_peak].copy(), "atac": adata[:, is_peak].copy()}
    modalities["atac"].var_names = modalities["atac"].var_names.str.removeprefix(PEAK)
    with mudata.set_options(pull_on_update=False):
        return mudata.MuData({name: modality for name, modality in modalities.items() if modality.n_vars})
