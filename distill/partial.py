"""What is being written, under another name until it is whole; and what killed processes left of that."""

import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.partial-(\d{1,20})")


def partial_of(path: Path) -> Path:
    """Where this process writes what is to stand at `path`, and puts what is to be deleted there."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def aside_of(path: Path) -> Path:
    """Where an earlier artifact waits while two folders are swapped in two steps."""
    return path.with_name(f".{path.name}.aside")


def clear_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left half written or half deleted in a folder, whatever it was to be."""
    for entry in list(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        found = _LEFTOVER.fullmatch(entry.name)
        if found:
            _clear(entry, int(found[1]))


def sweep(path: Path) -> int:
    """Remove what killed processes left of earlier tries at `path`; the process that fills a folder there now, or 0."""
    if aside_of(path).exists():  # killed between the renames of `exchange`
        os.rename(aside_of(path), path if not path.exists() else partial_of(path))
    writer = 0
    for entry in list(path.parent.iterdir()):
        found = _LEFTOVER.fullmatch(entry.name)
        if found and entry.name == f".{path.name}.partial-{found[1]}" and not _clear(entry, int(found[1])):
            writer = int(found[1])
    return writer


def _clear(entry: Path, pid: int) -> bool:
    """Remove a leftover, unless its process is alive; False for a folder that is locked, so that somebody fills it."""
    gone = pid == os.getpid() or not _alive(pid)
    if not entry.is_dir():
        if gone:
            entry.unlink(missing_ok=True)
        return True
    with suppress(FileNotFoundError):
        file = os.open(entry, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if gone:
                shutil.rmtree(entry)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
