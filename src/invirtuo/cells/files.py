"""Reading h5ad files that may be damaged, hostile or packed, and writing files that are whole or not there at all."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from invirtuo.cells.kinds import is_matrix_folder, modalities_of, modality_of, read_10x, read_mudata
from invirtuo.cells.packed import MAGIC, Unpacked, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas as pd
    from _typeshed import ReadableBuffer
    from anndata import AnnData
    from scipy import sparse

    AnyPath = str | os.PathLike[str]

__all__ = [
    "append_rows",
    "bytes_by_row",
    "check_h5ad",
    "check_h5ad_name",
    "check_sparse",
    "check_writable",
    "is_zarr_folder",
    "making",
    "plain_text",
    "read_h5ad",
    "reading",
    "system_error",
    "write_h5ad",
    "writing",
    "writing_h5ad",
    "writing_hdf5",
]

BLOCK = 1 << 22  # values read at a time
INFLATION = 2000  # gzip reaches about 1000
PATIENCE = 5.0  # seconds that the reader of a pipe may take
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors that only writing meets
H5AD = "h5ad"
ROOTS = {"mod": "MuData", "matrix": "10x Genomics", "col_attrs": "loom"}  # a name at the root of other kinds of files
SYSTEM_ERROR = re.compile(r"(?:errno = |os error |\[Errno )(\d+)")  # as HDF5, Rust and Python name them
# what readers raise for a damaged file
UNREADABLE = (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError)


# ---- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Missing folders are made. The temporary name keeps the suffix, so that writers that look at it agree. A link stays,
    and the file that it names is written. A pipe or a device gets the bytes when all of them are there.

    Parameters
    ----------
    path
        The file to write or replace.

    Raises
    ------
    ValueError
        If `path` is a folder, lies under a file, or is a pipe that nobody reads.
    OSError
        If the disk is full.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> with writing(folder / "scores.csv") as part:
    ...     _ = part.write_text("a,b")
    >>> (folder / "scores.csv").read_text()
    'a,b'
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file to write")

    # a stream cannot be renamed: the whole file is sent when it is complete
    if _is_stream(path):
        with tempfile.TemporaryDirectory(prefix="invirtuo-") as folder:
            temporary = Path(folder) / f"part{path.suffix}"
            yield temporary
            with _full_disk_named(path):
                _send(temporary, path)
        return
    target = Path(os.path.realpath(path))

    # beside the target: a rename within one file system is atomic
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.part{target.suffix}")
    with _full_disk_named(path), _folders(target):
        try:
            temporary.touch()
            replaced = target if target.exists() else temporary  # the new file gets its permissions
            mode = stat.S_IMODE(replaced.stat().st_mode)
            yield temporary
            temporary.chmod(mode)  # writers may begin with a private file of their own
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def making(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which must not exist; on success it takes that name.

    On failure it is removed; what a process that was killed left behind is removed by the next one.
    """
    folder = Path(folder)
    with _full_disk_named(folder), _folders(folder):
        # of runs that were killed
        for left_over in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
        temporary.mkdir()
        try:
            yield temporary
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_h5ad_name(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a file of cells is to have the name of a file of another kind."""
    suffix = Path(path).suffix
    if suffix not in ("", ".h5ad", ".h5", ".part") and not _is_stream(Path(path)):
        raise ValueError(f"{path} is named like a {suffix} file, and cells are written as .h5ad; give it that ending")


def check_writable(
    path: str | os.PathLike[str], *, folder: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse a result that could not be written, before any work is done for it; nothing is left behind.

    Parameters
    ----------
    path
        File to write or to replace, or a folder of results.
    folder
        Whether it is a folder.
    inputs
        Files that are read to make the result, which it must not replace.

    Raises
    ------
    ValueError
        Saying why it cannot be written.
    """
    path = Path(path)
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder for the results, give another name")
    if not folder and path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file to write")
    for given in inputs:
        if path.is_file() and os.path.isfile(given) and path.samefile(given):
            raise ValueError(f"{path} is read to make the result and would be replaced by it; give another name")
    if path.is_file() and not os.access(path, os.W_OK):
        raise ValueError(f"{path} is protected from writing; give another name, or change its permissions")
    if not _is_stream(path):
        _try_folder(path)


def write_h5ad(adata: AnnData, path: str | os.PathLike[str]) -> None:
    """Write cells as h5ad, compressed.

    Parameters
    ----------
    adata
        The cells; columns of text become categories.
    path
        The file to write or replace, as for :func:`writing`.
    """
    from anndata.io import write_elem

    check_h5ad_name(path)
    with writing(path) as temporary, writing_hdf5(temporary) as file:
        adata.strings_to_categoricals()
        write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip"})
        _drop_nulls(file, adata)


@contextmanager
def writing_h5ad(
    path: str | os.PathLike[str], obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]
) -> Iterator[h5py.File]:
    """An h5ad with all but X, open to be written to; it appears as `path` on success, and on failure not at all.

    Parameters
    ----------
    path
        The file to write or replace.
    obs, var, uns
        What X is to lie beside.
    """
    import anndata
    from anndata.io import write_elem

    check_h5ad_name(path)
    if _is_stream(Path(path)):
        raise ValueError(f"{path} is no regular file; cells are written here and there in an h5ad, give a file name")
    with writing(path) as temporary, writing_hdf5(temporary) as file:
        adata = anndata.AnnData(None, obs=obs, var=var, uns=uns)
        adata.strings_to_categoricals()
        write_elem(file, "/", adata)
        _drop_nulls(file, adata)
        yield file


def append_rows(file: h5py.File, rows: sparse.csr_matrix) -> None:
    """Write rows of X behind those that are there: CSR, compressed."""
    from anndata.io import sparse_dataset, write_elem

    if "X" in file and "data" in file["X"]:
        sparse_dataset(file["X"]).append(rows)
        return
    rows.indptr = rows.indptr.astype(np.int64)  # later rows may need it
    write_elem(file, "X", rows, dataset_kwargs={"compression": "gzip", "compression_opts": 1})


@contextmanager
def writing_hdf5(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file; if the disk is full, that is said once it is closed.

    Raises
    ------
    OSError
        If the disk is full.
    """
    with _Disk(path, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file
        finally:
            if disk.failure is not None:
                raise disk.failure


class _Disk(io.FileIO):
    """The file below an HDF5 file; if the disk is full it notes that, and lets HDF5 believe that all is well.

    HDF5 cannot close a file that it cannot write to: it prints a traceback for each of its objects, and the process
    crashes when it ends.
    """

    failure: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.failure is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0


def _drop_nulls(file: h5py.File, adata: AnnData) -> None:
    """Leave out what is not there, as AnnData does in files."""
    for name in ("X", "raw"):
        if getattr(adata, name) is None:
            file.pop(name, None)


@contextmanager
def _folders(path: Path) -> Iterator[None]:
    """Make the folders above a path; on failure those that were made go again."""
    _check_above(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # somebody else may have put something into it
                folder.rmdir()
        raise


def _check_above(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file; {path} cannot lie under it, give another name")
    return above


def _try_folder(path: Path) -> None:
    """Try to write where a file or folder is to lie."""
    target = Path(os.path.realpath(path))
    above = target if target.is_dir() else _check_above(target)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {above}: {error.strerror}; give another place") from error


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Say plainly that the disk is full, in whatever words a writer hides it."""
    try:
        yield
    except Exception as error:
        number = system_error(error)
        if number not in FULL:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def system_error(error: BaseException) -> int | None:
    """Number of the system error that an exception is, or that its text names."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = SYSTEM_ERROR.search(str(error))
    return None if found is None else int(found[1])


def _is_stream(path: Path) -> bool:
    """Whether a path is no regular file (a pipe, a device), or what this process prints to."""
    return path.exists() and not path.is_dir() and (not path.is_file() or _printed_to(path) is not None)


def _printed_to(path: Path) -> int | None:
    """Number of the standard stream of this process that a path is."""
    for number in (1, 2):
        with suppress(OSError):  # a stream may be closed
            if os.path.samestat(path.stat(), os.fstat(number)):
                return number
    return None


def _send(file: Path, path: Path) -> None:
    """Copy the bytes of a file into a pipe, a device or a standard stream."""
    number = _printed_to(path)
    if number is not None:
        sys.stdout.flush()
        handle = os.dup(number)
    else:
        handle = _opened(path)
    with file.open("rb") as source, os.fdopen(handle, "wb") as sink:
        shutil.copyfileobj(source, sink)


def _opened(path: Path) -> int:
    """A pipe or device to write to; the reader of a pipe may come a little later, but is not waited for without end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            # fails with ENXIO while nobody reads
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise ValueError(f"nobody reads from {path}; start the reader first, or give a file name") from error
        time.sleep(0.05)
    os.set_blocking(handle, True)
    return handle


# ---- reading -------------------------------------------------------------------------------------------------------


def read_h5ad(path: str | os.PathLike[str], *, backed: bool = False) -> AnnData:
    """Read cells, after :func:`check_h5ad` found nothing wrong with their file.

    Parameters
    ----------
    path
        File or zarr folder written by AnnData; a file may be packed with gzip (``.h5ad.gz``). Of MuData
        ``cells.h5mu/rna``, or the whole file where it has one modality, or RNA and ATAC, which are joined. Counts of
        10x Genomics, as HDF5 or a folder with ``matrix.mtx``.
    backed
        Leave X of an h5ad on disk (read-only). What a packed file holds lies in the folder for temporary files as long
        as the cells are there.

    Raises
    ------
    ValueError
        If the file is missing, truncated, not an h5ad, or its parts contradict each other.
    """
    import anndata

    given, modality = modality_of(path)
    path = plain(given)
    if is_zarr_folder(path):
        with reading(path, "zarr folder"):
            adata = anndata.io.read_zarr(path)
    elif is_matrix_folder(path):
        with reading(path, "folder of 10x Genomics"):
            adata = read_10x(path)
    else:
        kind = _checked_kind(path, values=True)
        wanted = modalities_of(path, modality) if kind == ROOTS["mod"] else []
        with reading(path, f"{kind} file"):
            if wanted:
                adata = read_mudata(path, wanted)
            elif kind == ROOTS["matrix"]:
                adata = read_10x(path)
            else:
                adata = anndata.io.read_h5ad(path, backed="r" if backed else None)
    if adata.X is None:
        raise ValueError(
            f"{path} has no X; expected cells x genes. Put the matrix into adata.X and write the file again"
        )
    adata.obs = plain_text(adata.obs)
    adata.var = plain_text(adata.var)
    if isinstance(path, Unpacked) and backed:
        weakref.finalize(adata, path.remove)  # the file is read as long as there are cells
    return adata


@contextmanager
def reading(path: AnyPath, kind: str = "h5ad file") -> Iterator[None]:
    """Say of damage that no check can see what file it is in.

    Raises
    ------
    ValueError
        For whatever readers raise.
    """
    import anndata

    try:
        yield
    except (*UNREADABLE, anndata._io.specs.registry.IORegistryError) as error:
        raise ValueError(
            f"{path} is not a readable {kind}: {_first_line(error)}. Write it again with AnnData"
        ) from error


def is_zarr_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder written by zarr."""
    return any((Path(path) / name).exists() for name in (".zgroup", "zarr.json"))


def plain_text(table: pd.DataFrame) -> pd.DataFrame:
    """Text of the nullable type, which not every AnnData writes, as plain objects; missing values as NaN."""
    import pandas as pd

    nullable = [column for column in table if isinstance(table[column].dtype, pd.StringDtype)]
    table = table.astype(dict.fromkeys(nullable, object)) if nullable else table
    for column in nullable:
        table[column] = table[column].where(table[column].notna(), np.nan)
    if isinstance(table.index.dtype, pd.StringDtype):
        table = table.set_axis(table.index.astype(object))
    return table


def bytes_by_row(path: str | os.PathLike[str]) -> int:
    """Bytes that X takes in memory; 0 if it is not stored by rows (CSR or dense), or not there.

    Raises
    ------
    ValueError
        As :func:`check_h5ad`.
    """
    path = plain(modality_of(path)[0])
    _checked_kind(path, values=False)
    with h5py.File(path, "r") as file:
        x = file.get("X")
        if isinstance(x, h5py.Group) and x.attrs.get("encoding-type") == "csr_matrix":
            return sum(x[name].nbytes for name in ("data", "indices") if name in x)
        return x.nbytes if isinstance(x, h5py.Dataset) else 0


def check_h5ad(path: str | os.PathLike[str], *, values: bool = True) -> None:
    """Refuse a file that leads out of itself or whose matrices contradict themselves.

    Refused are soft and external links, external storage and virtual datasets (a file from elsewhere could make
    us read any file of this machine), datasets that declare far more than they store, and sparse matrices whose
    indices leave the matrix. Without `values` matrices are not read; who reads them then checks the indices.

    Raises
    ------
    ValueError
        Saying what was found where.
    """
    kind = _checked_kind(plain(path), values)
    if kind != H5AD:
        raise ValueError(f"{path} is a {kind} file, and here h5ad is expected; write it with adata.write_h5ad")


def _checked_kind(path: AnyPath, values: bool) -> str:
    """What kind of file it is, after nothing wrong was found with it."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} {'is a folder' if os.path.isdir(path) else 'does not exist'}; expected an h5ad file")
    try:
        # open as a plain file first: says by itself what HDF5 takes for no HDF5 file: permissions, a stale mount
        with Path(path).open("rb") as opened:
            begin = opened.read(len(MAGIC))
        if begin == MAGIC:
            raise ValueError(f"{path} is packed with gzip; give it a name that ends in .gz, or unpack it")
        if not h5py.is_hdf5(path):
            raise ValueError(
                f"{path} is not an HDF5 file; expected one written by AnnData, MuData or 10x Genomics. Read other "
                "kinds with scanpy (read_csv, ...) and write them with adata.write_h5ad"
            )
        with h5py.File(path, "r") as file:
            kind = next((kind for name, kind in ROOTS.items() if name in file), H5AD)
            if kind == ROOTS["col_attrs"]:
                raise ValueError(f"{path} is a loom file; read it with anndata.io.read_loom, and use adata.write_h5ad")
            missing = [name for name in ("obs", "var") if name not in file]
            if missing and kind == H5AD:
                raise ValueError(f"{path} is HDF5 but has no {' and no '.join(missing)}; expected an h5ad file")
            _check_group(file, path, (), values)
            return kind
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: AnyPath, error: BaseException) -> str:
    """What is wrong: the file is in use, may not be read, or is damaged."""
    number = system_error(error)
    if number in (errno.EAGAIN, errno.EACCES) and "lock" in str(error):
        return (
            f"{path} is locked: another process has it open for writing. Close it there; on a network file system "
            "without locks, set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if number is not None:
        return f"{path} cannot be read: {os.strerror(number)}. Look at its permissions, and at the disk it lies on"
    return f"{path} is truncated or damaged: {_first_line(error)}. Copy or download it again"


def _check_group(group: h5py.Group, path: AnyPath, above: tuple[int, ...], values: bool) -> None:
    address = h5py.h5o.get_info(group.id).addr

    # a group that contains itself would be followed without end
    if address in above:
        raise ValueError(f"{path}: {group.name} contains itself; write the file again with AnnData")
    for name in group:
        where = f"{group.name.rstrip('/')}/{name}"
        # links may lead out of the file
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            target = f"{link.filename}:{link.path}" if isinstance(link, h5py.ExternalLink) else link.path
            raise ValueError(f"{path}: {where} is a link to {target}; links are not followed. Store the data itself")
        item = group[name]
        if isinstance(item, h5py.Group):
            _check_group(item, path, (*above, address), values)
        elif isinstance(item, h5py.Dataset):
            _check_dataset(item, path, where)
    if values and group.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        check_sparse(group, path)


def _check_dataset(data: h5py.Dataset, path: AnyPath, where: str) -> None:
    if data.is_virtual or data.external:
        raise ValueError(
            f"{path}: {where} keeps its values in other files; these are not opened. Store the data itself"
        )
    _check_filters(data, f"{path}: {where}")
    stored = data.id.get_storage_size()
    if data.shape is not None and data.nbytes > INFLATION * stored + 2**27:
        raise ValueError(f"{path}: {where} declares {data.nbytes:,} bytes but the file holds {stored:,} of them")


def _check_filters(data: h5py.Dataset, where: str) -> None:
    """The compression of a dataset can be undone here; hdf5plugin, where it is installed, brings more of them."""
    # every filter of the pipeline
    properties = data.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        number = properties.get_filter(i)[0]
        if h5py.h5z.filter_avail(number):
            continue
        with suppress(ImportError):
            import hdf5plugin  # noqa: F401 - adds its filters to HDF5
        if not h5py.h5z.filter_avail(number):
            raise ValueError(
                f"{where} is compressed with the HDF5 filter {number}, which is not installed; pip install hdf5plugin, "
                "or write the file again with gzip"
            )


def check_sparse(group: h5py.Group, path: AnyPath) -> None:
    """Shape, indptr and indices of a sparse matrix agree; reads indices a block at a time."""
    where = f"{path}: sparse matrix {group.name}"
    if not {"data", "indices", "indptr"} <= set(group) or "shape" not in group.attrs:
        raise ValueError(f"{where} needs data, indices, indptr and the attribute shape; found {sorted(group)}")

    # sizes first, then what they hold
    shape = np.asarray(group.attrs["shape"])
    data = group["data"]
    indices = group["indices"]
    indptr = group["indptr"]
    if shape.shape != (2,) or (shape < 0).any():
        raise ValueError(f"{where} has shape {shape.tolist()}; expected two numbers >= 0")
    n_major, n_minor = shape if group.attrs["encoding-type"] == "csr_matrix" else shape[::-1]
    if indptr.shape != (n_major + 1,):
        raise ValueError(f"{where} has indptr of shape {indptr.shape}; its shape {tuple(shape)} asks for {n_major + 1}")
    if data.ndim != 1 or data.shape != indices.shape:
        raise ValueError(f"{where} has {data.shape} values but {indices.shape} indices")
    pointers = indptr[:]
    has_ends = pointers[0] == 0 and pointers[-1] == len(indices)
    if not has_ends or (np.diff(pointers.astype(np.int64)) < 0).any():
        raise ValueError(f"{where} has an indptr that does not rise from 0 to the {len(indices)} stored values")

    # indices in blocks: they may not fit into memory
    for start in range(0, len(indices), BLOCK):
        block = indices[start : start + BLOCK]
        if block.min() < 0 or block.max() >= n_minor:
            raise ValueError(f"{where} has indices from {block.min()} to {block.max()}; expected 0 to {n_minor - 1}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
