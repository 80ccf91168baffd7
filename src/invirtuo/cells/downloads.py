"""Downloads that are whole or not there, and checksums of files and of the cells in them."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.packed import BLOCK, PACKED

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["download", "fingerprint", "is_address", "md5_of"]

PARTS = ("cells", "genes", "values", "labels")  # of a fingerprint
DIGITS = 8  # of the checksum of each part


def is_address(path: str | os.PathLike[str] | None) -> bool:
    """Whether a path is an http(s) address."""
    return isinstance(path, str) and urlsplit(path).scheme in ("http", "https")


def download(url: str, file: Path, md5: str | None = None) -> Path:
    """Download into `file`, with a progress bar in a terminal; a file that is there is taken as it is.

    Parameters
    ----------
    url
        http(s) address. What is packed with gzip, by its name, is unpacked.
    file
        Where the unpacked file is kept; missing folders are made.
    md5
        Checksum of the unpacked file; None if it is not known. A file that is there with another one is replaced.

    Raises
    ------
    ValueError
        If it cannot be downloaded, unpacked or written, or has another checksum. Then nothing is kept.
    """
    import pooch

    registry = {file.name: None if md5 is None else f"md5:{md5}"}
    cache = pooch.create(path=file.parent, base_url="", registry=registry, urls={file.name: url})
    try:
        cache.fetch(file.name, downloader=_fetch)
    except (OSError, ValueError, EOFError, zlib.error) as error:  # OSError: also what requests raises
        raise ValueError(f"cannot download {url} ({error})") from error
    return file


def _fetch(url: str, target: str, _: Any) -> None:
    """Downloader of pooch: writes a temporary file, which pooch checks and renames."""
    import pooch

    is_packed = urlsplit(url).path.endswith(PACKED)
    part = f"{target}{PACKED}" if is_packed else target
    try:
        pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=BLOCK)(url, part, None)
        if is_packed:
            with gzip.open(part) as packed, open(target, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, BLOCK)
    finally:
        if is_packed:
            Path(part).unlink(missing_ok=True)


def md5_of(file: str | os.PathLike[str]) -> str:
    """MD5 checksum of a file."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fingerprint(adata: AnnData, columns: Sequence[str]) -> dict[str, str]:
    """Checksums of what a data set is, whatever the bytes of its file.

    Parameters
    ----------
    adata
        Cells, (n, g); X may be sparse or dense.
    columns
        Columns of obs that count. Numbers are compared to six digits, all else as text.

    Returns
    -------
    The first digits of SHA-256 of ``cells`` and ``genes`` (their names in order), ``values`` (X as float32) and
    ``labels`` (the columns; empty if one is missing).

    Examples
    --------
    >>> import invirtuo as iv
    >>> adata = iv.datasets.toy()
    >>> dense = adata.copy()
    >>> dense.X = adata.X.toarray()
    >>> fingerprint(dense, ["cell_type"]) == fingerprint(adata, ["cell_type"])
    True
    """
    x = sparse.csr_matrix(adata.X, dtype=np.float32, copy=True)
    x.sum_duplicates()
    x.eliminate_zeros()
    has_all = set(columns) <= set(adata.obs.columns)
    labels = [line for column in columns for line in _text(adata.obs[column])] if has_all else []
    values = (x.data.astype("<f4"), x.indices.astype("<i8"), x.indptr.astype("<i8"))
    found = [_sha256(_lines(adata.obs_names)), _sha256(_lines(adata.var_names)), _sha256(*values)]
    found.append(_sha256(_lines(labels)) if has_all else "")
    return dict(zip(PARTS, found, strict=True))


def _text(column: pd.Series) -> list[str]:
    if pd.api.types.is_numeric_dtype(column):
        return [f"{value:.6g}" for value in column]
    return [str(value) for value in column]


def _lines(words: Sequence[str]) -> bytes:
    return "\n".join(words).encode()


def _sha256(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:DIGITS]
