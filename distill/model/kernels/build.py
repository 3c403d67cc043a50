"""The compiled part: built by the system's compiler on first use, kept in the user's cache folder.

Nothing is built at install. Where there is no compiler, or the build fails, one logged line says why and `library()` is
None from then on: whoever asks goes on in plain torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHE_VARIABLE = "DISTILL_KERNEL_CACHE"
"""Environment variable: the folder where compiled kernels are kept, instead of the user's cache folder."""
PARALLEL_FROM = 1 << 17
"""Entries from which on a call is spread over threads: less is done before a second thread wakes up."""

_log = logging.getLogger(__name__)
_local = threading.local()
_HERE = Path(__file__).parent
# Nothing here changes what a NaN, an infinity or a denormal does (-ffast-math would flush denormals).
_COMMON = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Tried in this order: the first that the compiler takes. Without OpenMP the kernels run on one thread.
_VARIANTS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_COMPILE_SECONDS = 120


class KernelBuildError(RuntimeError):
    """The kernels cannot be compiled, or not be loaded, on this machine."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where this machine cannot have them (logged once)."""
    try:
        return _load(_built())
    except KernelBuildError as error:
        _log.warning("fast CPU kernels are off, plain torch is used: %s", error)
        return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "distill-bridges" / "kernels"


def compiler() -> str | None:
    """$CXX where it is set, else g++, clang++ or c++ from the path."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shutil.which(chosen)
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def threads(entries: int) -> int:
    """How many threads a call gets: torch's number, one where the work is smaller than the wake-up of a thread."""
    return torch.get_num_threads() if entries >= PARALLEL_FROM else 1


def workspace(count: int) -> Tensor:
    """`count` 4-byte places that a thread keeps between calls: fresh memory costs a page fault per 4 KB."""
    held = getattr(_local, "held", None)
    if held is None or held.numel() < count:
        held = _local.held = torch.empty(count)
    return held


def call(name: str, *arguments: Tensor | int | float | ctypes.Array | None) -> None:
    """Runs a compiled function: tensors and arrays go as pointers, integers as int64, floats as float32, None as null.

    Arguments:
        name: the C function, which returns nothing.
        arguments: tensors are contiguous and of the type that the function declares.
    """
    compiled = library()
    assert compiled is not None, f"{name}: no compiled kernels; ask `available()` first"
    getattr(compiled, name)(*map(_as_c, arguments))


def _as_c(value: Tensor | int | float | ctypes.Array | None) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous() and value.device.type == "cpu", f"{value.stride()} on {value.device}"
        return c_void_p(value.data_ptr())
    if value is None:
        return c_void_p(None)
    if isinstance(value, ctypes.Array):
        return value
    return c_float(value) if isinstance(value, float) else c_int64(value)


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.cpp"))


def _key(flags: tuple[str, ...]) -> str:
    """Names one build: what is compiled, how, and the processor for which."""
    digest = hashlib.sha256()
    for path in sorted([*_HERE.glob("*.hpp"), *_sources()]):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update("\0".join([*_COMMON, *flags, platform.machine(), _processor()]).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """The instruction sets of this processor, so that a cache shared by unlike machines holds one build for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _built() -> Path:
    """The path of the library for this processor, compiled where it is not there yet."""
    try:
        folder = cache_folder()
        targets = [(flags, folder / f"kernels-{_key(flags)}.so") for flags in _VARIANTS]
        for _, target in targets:
            if target.is_file():
                return target
        program = compiler()
        if program is None:
            raise KernelBuildError("no C++ compiler found (g++, clang++, or the one that CXX names)")
        folder.mkdir(parents=True, exist_ok=True)
        return _compile(program, targets)
    except OSError as error:
        raise KernelBuildError(f"cache folder not usable, {CACHE_VARIABLE} names another: {error}") from error


def _compile(program: str, targets: list[tuple[tuple[str, ...], Path]]) -> Path:
    said = ""
    for flags, target in targets:
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        os.close(handle)
        command = [program, *_COMMON, *flags, *map(str, _sources()), "-o", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
            if done.returncode == 0:
                # Two processes may build at once: each renames a whole file, and both are the same.
                os.replace(name, target)
                return target
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
        except subprocess.TimeoutExpired:
            said = f"not done after {_COMPILE_SECONDS} s"
        finally:
            Path(name).unlink(missing_ok=True)
    raise KernelBuildError(f"{program} failed: {said}")


def _load(path: Path) -> ctypes.CDLL:
    try:
        with _patient_threads():
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"{path} cannot be loaded: {error}") from error


@contextmanager
def _patient_threads() -> Iterator[None]:
    """Threads of an OpenMP library loaded inside sleep while they wait, where nobody chose otherwise.

    It reads the variable as it is loaded. Waiting by spinning takes the processor from torch's own threads.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]
