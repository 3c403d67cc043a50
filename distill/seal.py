"""A seal: the hash of what a JSON object says, inside the object, so that a changed byte is noticed without a manifest.

An object without a seal, of a time when there were none or written by a person, is taken as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.fingerprint import ArtifactError

SEAL = "seal"
_DIGITS = 2 * hashlib.sha256().digest_size
_OUTSIDE = (SEAL, "format_version")
"""Not under the seal: versions are checked by themselves, before anything else is looked at."""


def seal_of(record: Mapping[str, Any]) -> str:
    """sha256 (hex) of an object of plain JSON values, without seal and version, whatever the order of its names."""
    content = {name: value for name, value in record.items() if name not in _OUTSIDE}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_seal(path: str | Path, record: Mapping[str, Any], what: str) -> None:
    """`ArtifactError` naming the file where an object has a seal that is not its own.

    A seal under a changed name is one too: it is known by being the hash of all else.
    """
    broken = SEAL in record and record[SEAL] != seal_of(record)
    if SEAL not in record:
        broken = any(
            isinstance(value, str)
            and len(value) == _DIGITS
            and value == seal_of({key: other for key, other in record.items() if key != name})
            for name, value in record.items()
        )
    if broken:
        raise ArtifactError(f"{path}: {what} is not what was written, its seal does not fit: changed or damaged")
