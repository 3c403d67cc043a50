"""What is asked of the file system: to flush, to swap two folders, and to say why a write failed.

Libraries in other languages report a full disk as errors of their own; `disk_errors` gives them their name.
"""

import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Rust's words, by which safetensors and tokenizers pass an error of the system on.
_CODE = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)\b")
# torch's writer, and numpy's where it writes fewer bytes than it was given; the system's number is lost in both.
_CUT_SHORT = re.compile(
    r"PytorchStreamWriter failed writing|enforce fail at inline_container|\d+ requested and \d+ written"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_SMALL = 1 << 20
"""Bytes free under which a disk counts as full, where an error does not say why it came."""


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Within it, an error of a library about a file that could not be written is an `OSError` naming `path`."""
    try:
        yield
    except Exception as error:
        number = _number(error, Path(path))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _number(error: Exception, path: Path) -> int | None:
    """The system's number of an error that hides one, None for every other."""
    if isinstance(error, OSError) and error.errno is not None:
        return None
    found = _CODE.search(str(error))
    if found is not None:
        return int(found[1] or found[2])
    if _CUT_SHORT.search(str(error)):
        return errno.ENOSPC if _free(path) < _SMALL else errno.EIO
    return None


def _free(path: Path) -> int:
    """Bytes free where `path` is to stand."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    state = os.statvfs(there)
    return state.f_bavail * state.f_frsize


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def exchange(one: Path, two: Path, aside: Path) -> None:
    """Swap two folders: in one step where the kernel can (Linux), else by way of the name `aside`."""
    if sys.platform == "linux":
        names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE)
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # some C libraries lack it, some file systems refuse
        if renameat2 is not None and renameat2(*names) == 0:
            return
    os.rename(two, aside)
    os.rename(one, two)
    os.rename(aside, one)
