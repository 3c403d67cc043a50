"""Who works in a folder: one process at a time, known by name.

The lock is the kernel's (`flock` on `{folder}/.lock`), so that it goes with the process that holds it, however that
ends; what the file says, process and host, is for people alone. It is taken again and again by the thread that has it.
A lock is its process's alone: a child forked while it is held has none, keeps nobody out once its parent is dead, and
is itself refused while the parent lives.
"""

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.fingerprint import ArtifactError

_LOCK = ".lock"
_held: dict[tuple[str, int], int] = {}
"""How often each folder is locked, by its path and the thread that has it."""
_files: set[int] = set()
"""Open files whose locks end with this process."""


def _let_go() -> None:
    """In a forked child: the kernel's lock stays as long as any copy of its descriptor, so the child's are closed."""
    for file in _files:
        os.close(file)
    _files.clear()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Hold `folder` (made where it is missing) for this thread, until the outermost body ends or the process does.

    Raises `ArtifactError` that names the folder, the process and its host when another run holds it.
    """
    folder = Path(folder)
    key = str(folder.resolve()), threading.get_ident()
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            if key in _held:  # not in a child forked meanwhile
                _held[key] -= 1
        return
    with held_file(_taken(folder)) as file:
        _held[key] = 1
        try:
            yield
        finally:
            if _held.pop(key, 0):
                os.ftruncate(file, 0)  # the file stays, for removing it would race with the next holder


@contextmanager
def held_file(file: int) -> Iterator[int]:
    """Keep a locked descriptor for this process alone: closed in forked children, unlocked and closed at the end."""
    _files.add(file)
    try:
        yield file
    finally:
        if file in _files:
            # Unlocked by word: a child forked from here on may still have a copy.
            fcntl.flock(file, fcntl.LOCK_UN)
            _files.discard(file)
            os.close(file)


def check_unlocked(folder: str | Path) -> None:
    """Raises `ArtifactError`, as `lock`, when another run works in `folder`; makes no file."""
    folder = Path(folder)
    if (str(folder.resolve()), threading.get_ident()) in _held or not (folder / _LOCK).is_file():
        return
    file = os.open(folder / _LOCK, os.O_RDWR)
    try:
        _lock(file, folder)
    finally:
        os.close(file)


def _taken(folder: Path) -> int:
    """The locked file of a folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, folder)
            if _is_there(file, folder / _LOCK):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # of a folder that was moved away between the two: again


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 300, 0).decode(errors="replace").strip() or "unknown"
        raise ArtifactError(f"{folder}: in use by another run (process {holder})") from None


def _is_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
