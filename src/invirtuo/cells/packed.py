"""Files that are packed with gzip, unpacked where nobody keeps files of their own, and removed afterwards."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import weakref
import zlib
from pathlib import Path

__all__ = ["PACKED", "Unpacked", "is_packed", "plain"]

PACKED = ".gz"
MAGIC = b"\x1f\x8b"  # how every gzip file begins
BLOCK = 1 << 20  # bytes in memory at a time


class Unpacked(os.PathLike[str]):
    """A packed file, unpacked into the folder for temporary files until nobody holds this any more.

    It is a path of the unpacked file, and in messages the name of the packed one.

    Parameters
    ----------
    path
        The packed file.

    Raises
    ------
    ValueError
        If it is no gzip file, is truncated or damaged, or there is no room for what it holds.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.packed = Path(path)
        folder = tempfile.mkdtemp(prefix="invirtuo-")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._file = os.path.join(folder, self.packed.stem)
        try:
            self._unpack()
        except BaseException:
            self.remove()
            raise

    def __fspath__(self) -> str:
        return self._file

    def __str__(self) -> str:
        return str(self.packed)

    def remove(self) -> None:
        """Remove what was unpacked, if it is still there."""
        self._remove()

    def _unpack(self) -> None:
        try:
            # in pieces: the content may be larger than memory
            with gzip.open(self.packed) as source, open(self._file, "xb") as target:
                shutil.copyfileobj(source, target, BLOCK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.packed} is not a whole gzip file: {error}. Copy or download it again, or unpack it yourself"
            ) from error
        except OSError as error:
            raise ValueError(
                f"{self.packed} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}. The environment "
                "variable TMPDIR names another folder; or unpack the file yourself"
            ) from error


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named as one that is packed with gzip."""
    return Path(path).suffix == PACKED and not Path(path).is_dir()


def plain(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path of a file as it is, or of what it holds if it is packed, which stays as long as the path is held.

    Parameters
    ----------
    path
        A file, a folder, or a path that this gave.

    Raises
    ------
    ValueError
        As :class:`Unpacked`, or if a file that is packed by its name does not exist.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "a.txt.gz").write_bytes(gzip.compress(b"cells"))
    >>> path = plain(folder / "a.txt.gz")
    >>> Path(path).read_text(), Path(str(path)).name
    ('cells', 'a.txt.gz')
    """
    if isinstance(path, Unpacked) or not is_packed(path):
        return path
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; expected an h5ad file, packed or not")
    return Unpacked(path)
