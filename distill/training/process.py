"""The process that trains: its memory, and what Ctrl-C does to it."""

import ctypes
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into an answer "yes" of the function handed out; a second one interrupts as usual."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def tune_malloc() -> bool:
    """Let glibc keep freed memory instead of returning it: up to 1.6 times faster steps on a CPU (page faults).

    Sets M_MMAP_MAX to 0 and M_TRIM_THRESHOLD to 1 GiB for the whole process. Returns whether glibc is there and agreed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**30))


def hardware(device: torch.device, processes: int = 1) -> str:
    """What a training runs on, for its record: the device's name, or kind of processor, threads and cores."""
    if device.type == "cuda":
        one = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        one = f"{platform.machine()} processor, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    else:
        one = str(device)
    return one if processes == 1 else f"{processes} processes, each {one}"
