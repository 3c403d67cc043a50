"""From an options dataclass to a command line.

A recipe declares one frozen, keyword-only dataclass (a string literal below each field is its help) and hands it to
`run` with the function that does the work. Flags are generated from the fields, nested dataclasses included
(`--config.n-layer 8`). Whatever a person can get wrong comes back as one line on stderr and status 2; everything else
is a bug and keeps its traceback.
"""

import errno
import io
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:  # torch takes a second to import, which `--help` and a mistyped flag need not wait for
    import torch

Options = TypeVar("Options")

_BAD_PLACES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_BAD_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def no_type_check(checked: type[Options]) -> type[Options]:
    """Marks a dataclass that checks its own values, so that run-time type checkers leave its `__init__` alone.

    They go by the name of the decorator. Unlike `typing.no_type_check` this one leaves the type hints readable, from
    which the command line is made.
    """
    return checked


def run(
    body: Callable[[Options], None],
    options: type[Options],
    argv: Sequence[str] | None,
    *,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Parse `argv` into `options` and call `body` with them.

    Arguments:
        body: does the work.
        options: a frozen, keyword-only dataclass; fields may be dataclasses themselves.
        argv: the words after the program's name; None takes those of the process.
        description: stands at the top of `--help`.
        presets: name to {dotted field: value}, new defaults under `--preset NAME`; flags given by hand win.

    Returns the exit status: 0, also after `--help`; 2 with one line `error: ...` on stderr for a flag that cannot be
    read, a `ValueError`, or a file that cannot be found, read or written; 130 after Ctrl-C.
    """
    try:
        parsed = parse(options, sys.argv[1:] if argv is None else argv, description=description, presets=presets)
        if parsed is not None:
            body(parsed)
    except ValueError as error:
        return _refuse(str(error) or type(error).__name__)
    except OSError as error:
        if not isinstance(error, _BAD_PLACES) and error.errno not in _BAD_ERRNOS:
            raise
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        return _refuse(f"{' -> '.join(places)}: {error.strerror}" if places and error.strerror else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse(
    options: type[Options],
    argv: Sequence[str],
    *,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Options | None:
    """The options that `argv` stands for, None after printing the help; arguments as for `run`.

    Raises `ValueError` in one line that names the flag and what is allowed.
    """
    argv = list(argv)
    target: Any = options
    if presets:
        target = _with_preset(options, presets)
        argv = [*_preset_words(argv, presets), *argv]
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint), _unwrapped(argv):
            parsed = tyro.cli(target, args=argv, prog=Path(sys.argv[0]).name, description=description)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ValueError(_reason(complaint.getvalue(), target.__name__) + _switch(complaint.getvalue(), argv)) from None
    sys.stderr.write(complaint.getvalue())  # warnings of Python's own
    return options(**{f.name: getattr(parsed, f.name) for f in fields(options)}) if presets else parsed  # pyright: ignore[reportArgumentType]


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (every device); `ValueError` outside 0 to 2^32 - 1."""
    import numpy
    import torch

    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, allowed are 0 to {2**32 - 1}")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def several_on_cpus() -> bool:
    """Whether this is one of several processes on a machine without an accelerator.

    Accelerate has to be told so; otherwise each of them works as if it were alone.
    """
    import torch

    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def pick_device(name: str) -> "torch.device":
    """The device of that name; "auto" is the first GPU where there is one, else the CPU.

    Raises `ValueError` for a name torch does not know and for a device this machine does not have.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}, allowed are auto, cpu, cuda, cuda:0, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, allowed are auto, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here; take cpu or auto"
        )
    return device


def _with_preset(options: type[Any], presets: Mapping[str, Mapping[str, Any]]) -> type[Any]:
    """`options` with one more field, so that `--preset` stands in the help and is checked like any other flag."""
    chosen = "; ".join(
        f"{name}: " + ", ".join(f"{path} {_shown(value)}" for path, value in values.items())
        for name, values in presets.items()
    )
    kind = Annotated[Literal[tuple(presets)] | None, tyro.conf.arg(help=f"New defaults; other flags win. {chosen}.")]
    made = make_dataclass(
        options.__name__, [("preset", kind, field(default=None))], bases=(options,), frozen=True, kw_only=True
    )
    made.__doc__ = options.__doc__
    return made


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _preset_words(argv: Sequence[str], presets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The flags that the last `--preset` in `argv` stands for; an unknown one is left to the parser to refuse."""
    name = ""
    for index, word in enumerate(argv):
        if word == "--preset":
            name = "".join(argv[index + 1 : index + 2])
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    words = []
    for path, value in presets.get(name, {}).items():
        *outer, last = path.replace("_", "-").split(".")
        if isinstance(value, bool):
            words.append("--" + ".".join([*outer, last if value else f"no-{last}"]))
        else:
            words += ["--" + ".".join([*outer, last]), *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


@contextmanager
def _unwrapped(argv: Sequence[str]) -> Iterator[None]:
    """Let complaints run on in one line, as wide as they are, instead of being broken at the terminal's width."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(argv):
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif "COLUMNS" in os.environ:
            del os.environ["COLUMNS"]


def _reason(box: str, root: str) -> str:
    """One line out of the box that tyro draws: its first part, then the accepted forms from the later ones."""
    parts: list[list[str]] = [[]]
    lines = [line.strip() for line in _ESCAPES.sub("", box).splitlines()]
    for line in lines:
        text = line.strip("│").strip()
        if text and not text.strip("─-"):
            parts.append([])
        elif text and text[0] not in "╭╰":
            parts[-1].append(text)
    if not lines[0].startswith("╭"):  # a terminal without Unicode: the title stands over a rule of its own
        del parts[0]
    first, *hints = [" ".join(part) for part in parts]
    first = first.split(". Got errors:")[0].removeprefix("Error parsing ").removeprefix(f"{root}: ")
    hints = [text.replace("Argument helptext:", "expected") for text in hints if not text.startswith("For full help")]
    if not hints and first.startswith("Unrecognized"):
        hints = ["--help lists every flag"]
    return "; ".join([first, *hints])


def _switch(box: str, argv: Sequence[str]) -> str:
    """Which flag it is about where a value was given to one that takes none: the complaint names the value alone."""
    given = [word.partition("=") for word in argv if word.startswith("--") and "=" in word]
    found = [flag for flag, _, value in given if value and "Unrecognized" in box and value in box and flag not in box]
    return (
        f"; {found[0]} takes no value, allowed are {found[0]} and {found[0].replace('--', '--no-', 1)}" if found else ""
    )


def _refuse(message: str) -> int:
    print("error:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    return 2
