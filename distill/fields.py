"""Fields of an object that came out of a file: are they there, and of the kind that the program goes on with?"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.fingerprint import ArtifactError

_WORDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false", dict: "an object",
          list: "a list"}  # fmt: skip


def check_fields(path: str | Path, record: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Refuses an object in which a field is missing or of another kind.

    Arguments:
        record: as read from the file at `path`.
        kinds: by name of the field: str, int, float (any finite number), bool, dict or list.

    Raises `ArtifactError` that names the file, the field, what it holds and what is allowed.
    """
    for name, kind in kinds.items():
        if name not in record:
            raise ArtifactError(f"{path}: holds no {name!r}")
        if not _is(record[name], kind):
            raise ArtifactError(f"{path}: {name} is {_short(record[name])}, allowed is {_WORDS[kind]}")


def check_numbers(path: str | Path, name: str, numbers: Mapping[str, Any]) -> None:
    """`ArtifactError` where an object of numbers by name, a field called `name`, holds anything else."""
    for key, value in numbers.items():
        if not _is(value, float):
            raise ArtifactError(f"{path}: {name}.{key} is {_short(value)}, allowed is {_WORDS[float]}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) <= 1e308 and math.isfinite(value)
    return type(value) is kind


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
