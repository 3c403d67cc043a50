"""Reads what strangers made, in a process that has little memory, and says what came of it and how much it took.

    python tests/reliability/bounded.py < CASES

CASES is JSON: a list of [READER, WHOLE, SPOILED], a name of `READERS` and two paths. Every whole one is read first, so
that what only the first call takes is not counted. Prints for every spoiled one a line of JSON: `loaded`, or `refused`
and why; `bytes`, by which the most memory ever held has grown, torch's included; `denied`, whether more was asked for
than the `ROOM` that there is.
"""

import json
import resource
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOM = 2**29
"""Bytes of address space that reading may take, beyond what the process had before."""


def limited(room: int) -> None:
    """Lets this process have so many bytes of address space more than it has now, and no more."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def peak() -> int:
    """The most memory that this process has held so far, in bytes.

    Not `ru_maxrss`, which begins with what the process held that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def denied(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides, is that of a system that gives no more memory."""
    while error is not None:
        if isinstance(error, MemoryError) or "not enough memory" in str(error) or "can't allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def readers() -> Mapping[str, Callable[[Path], Any]]:
    from bridges import Bridges
    from distill import load_model, load_tokenizer
    from distill.circuits import Circuit
    from distill.circuits.standalone import Standalone
    from distill.model.openai import read_checkpoint

    return {
        "model": load_model,
        "tokenizer": load_tokenizer,
        "bridges": Bridges.load,
        "circuit": Circuit.load,
        "standalone": Standalone.load,
        "openai": read_checkpoint,
    }


def outcome(read: Callable[[Path], Any], path: Path) -> dict[str, Any]:
    before, refused, asked = peak(), "", False
    try:
        read(path)
    except (ValueError, MemoryError, RuntimeError) as error:
        refused, asked = f"{type(error).__name__}: {error}", denied(error)
    return {"refused": refused, "bytes": peak() - before, "denied": asked}


def main() -> None:
    cases, known = json.load(sys.stdin), readers()
    warnings.simplefilter("ignore")
    for reader, whole in dict.fromkeys((reader, whole) for reader, whole, _ in cases):
        known[reader](Path(whole))
    limited(ROOM)
    for reader, _, spoiled in cases:
        print(json.dumps(outcome(known[reader], Path(spoiled))), flush=True)


if __name__ == "__main__":
    main()
