"""Spoiled copies of files: bytes, and JSON values inside, with all hashes made to fit again, as a stranger could.

    python tests/reliability/fuzz.py FORMAT FIRST COUNT

reads the example of a format (of `artifacts.py`) spoiled by each of the seeds FIRST ... FIRST + COUNT - 1, and prints
those that end in anything but a value or a `ValueError`, a panic of a library included, or that took memory because a
file says so: more than `MEMORY` at once. A seed alone decides what is done to which file.
"""

import importlib.util
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from distill.artifact import MANIFEST, fingerprint
from distill.seal import SEAL, seal_of

WEIRD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 255, 2**16, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-300, 1e308),
    *("", "x", "1", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\u202e", "</script>", "F32", "BOOL"),
    *("float16", "int64", "dense", "sparse", "half", "0.attn.q", "9" * 30, "²", "none", "auto", "gpt2", "llama"),
    *([], {}, [[]], [None], [0], [-1], ["x"], {"": 0}, {"x": {}}, [1] * 50, [[[[[[[[1]]]]]]]]),
]
DEEP = "[" * 100_000
MEMORY, ROOM = 2**29, 2**33
"""Bytes that one input may take at its peak beyond what was taken before, and that this process may ask for at all."""


def spoil(folder: Path, targets: list[Path], seed: int) -> Path:
    """Changes one of the files, and in three of four cases makes its hashes fit; the file."""
    draw = random.Random(seed)
    path = draw.choice(targets)
    raw = path.read_bytes()
    changes: list[Callable[[bytes, random.Random], bytes]] = [_bits, _cut, _moved, _inserted, _number]
    if path.suffix == ".safetensors":
        changes += [_head_value] * 8 + [_head_length]
    elif path.suffix in (".json", ".jsonl"):
        changes += [_json_value] * 12 + [_deep]
    elif path.suffix == ".pt":
        changes += [_bits, _number]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        raw = draw.choice(changes)(raw, draw)
    path.write_bytes(raw)
    if draw.random() < 0.75:
        reseal(path)
        manifest = next((place / MANIFEST for place in path.parents if (place / MANIFEST).is_file()), None)
        if manifest is not None and manifest != path and manifest.is_relative_to(folder):
            _list_again(manifest)
    return path


def reseal(path: Path) -> None:
    """Makes the hashes inside a file fit what it says now, where it says anything."""
    try:
        if path.suffix == ".json":
            record = json.loads(path.read_bytes())
            if isinstance(record, dict) and SEAL in record:
                path.write_text(json.dumps({**record, SEAL: seal_of(record)}))
        elif path.suffix == ".safetensors":
            raw = path.read_bytes()
            head, body = _split(raw)
            said = json.loads(head["__metadata__"]["distill"])
            said["sha256"] = fingerprint(load_safetensors(raw))
            said[SEAL] = seal_of(said)
            head["__metadata__"]["distill"] = json.dumps(said)
            path.write_bytes(_joined(head, body))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error, SafetensorError):
        return  # no longer of that form


def _list_again(manifest: Path) -> None:
    import hashlib

    record = json.loads(manifest.read_bytes())
    for name in record.get("files", {}):
        path = manifest.parent / name
        if path.is_file():
            raw = path.read_bytes()
            record["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest.write_text(json.dumps({**record, SEAL: seal_of(record)}))


def _split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _joined(head: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# --- changes ---------------------------------------------------------------------------------------------------------


def _bits(raw: bytes, draw: random.Random) -> bytes:
    found = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if found:
            found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def _cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw) + 1)]


def _moved(raw: bytes, draw: random.Random) -> bytes:
    one, two = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    return draw.choice((raw[:one] + raw[two:], raw[:two] + raw[one:two] + raw[two:]))


def _inserted(raw: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(raw) + 1)
    return raw[:place] + draw.choice((b"\0", b"\xff", b'"', b"}", b"[", b"\n", draw.randbytes(8))) + raw[place:]


def _number(raw: bytes, draw: random.Random) -> bytes:
    places = [place for place, byte in enumerate(raw) if 48 <= byte <= 57]
    if not places:
        return raw
    place = draw.choice(places)
    return raw[:place] + draw.choice((b"9", b"-1", b"99999999999", b"1e999", b"0.5", b"")) + raw[place + 1 :]


def _head_length(raw: bytes, draw: random.Random) -> bytes:
    return struct.pack("<Q", draw.choice((0, 1, 7, len(raw), 2**31, 2**62, 2**64 - 1))) + raw[8:]


def _deep(raw: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(raw) + 1)
    return raw[:place] + DEEP.encode() + raw[place:]


def _json_value(raw: bytes, draw: random.Random) -> bytes:
    lines = raw.split(b"\n")
    at = draw.randrange(len(lines)) if raw.count(b"\n{") or raw.startswith(b"{") and len(lines) > 3 else None
    try:
        whole = json.loads(raw)
        return json.dumps(_swapped(whole, draw)).encode()
    except (ValueError, RecursionError):
        if at is None:
            return raw
    try:
        lines[at] = json.dumps(_swapped(json.loads(lines[at]), draw)).encode()
    except (ValueError, RecursionError):
        return raw
    return b"\n".join(lines)


def _head_value(raw: bytes, draw: random.Random) -> bytes:
    try:
        head, body = _split(raw)
        said = json.loads(head["__metadata__"]["distill"])
        if draw.random() < 0.6:
            head["__metadata__"]["distill"] = json.dumps(_swapped(said, draw))
        else:
            head = _swapped(head, draw)
        return _joined(head, body)
    except (ValueError, KeyError, TypeError, RecursionError, struct.error):
        return raw


def _swapped(value: Any, draw: random.Random) -> Any:
    """The same JSON with one value somewhere in it changed, taken away, or given another name."""
    places = list(_places(value, []))
    where = draw.choice(places)
    value = json.loads(json.dumps(value))
    if not where:
        return draw.choice(WEIRD)
    inner = value
    for key in where[:-1]:
        inner = inner[key]
    last = where[-1]
    way = draw.random()
    if way < 0.15:
        del inner[last]
    elif way < 0.25 and isinstance(inner, dict):
        inner[str(draw.choice(("x", "..", "", last + "x")))] = inner.pop(last)
    elif way < 0.35:
        inner[last] = [inner[last]]
    elif way < 0.45 and isinstance(inner[last], int | float):
        inner[last] = inner[last] * draw.choice((-1, 2, 10**6, 10**12)) + draw.choice((-1, 0, 1))
    else:
        inner[last] = draw.choice(WEIRD)
    return value


def _places(value: Any, path: list[Any]) -> Any:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(items):
        if number < 60:
            yield from _places(inner, [*path, key])


# --- a run -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOUNDED = load(Path(__file__).with_name("bounded.py"))


class Bench:
    """The whole example of a format, and a copy that is spoiled again and again."""

    def __init__(self, known: Any, place: Path) -> None:
        self.known, self.whole, self.copy = known, place / "whole", place / "copy"
        self.whole.mkdir(parents=True)
        known.write(self.whole)
        shutil.copytree(self.whole, self.copy)
        self.targets = known.targets(self.copy)
        self.kept = {path: path.read_bytes() for path in self.copy.rglob("*") if path.is_file()}

    def outcome(self, seed: int) -> str:
        """What comes of one seed: loaded or refused. Whatever else is raised is passed on."""
        spoil(self.copy, self.targets, seed)
        try:
            fingerprint(self.known.read(self.copy))
            return "loaded"
        except ValueError as error:
            assert str(error).strip()
            assert not BOUNDED.denied(error), f"asked for more memory than {ROOM} bytes: {error}"
            return "refused"
        finally:
            for path, raw in self.kept.items():
                path.write_bytes(raw)


def main(name: str, first: int, count: int) -> int:
    module = load(Path(__file__).with_name("artifacts.py"))
    torch.set_num_threads(1)
    begun, found, failed = time.process_time(), {"loaded": 0, "refused": 0}, 0
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(module.FORMATS[name], Path(place))
        bench.known.read(bench.whole)
        BOUNDED.limited(ROOM)
        for seed in range(first, first + count):
            before = BOUNDED.peak()
            try:
                found[bench.outcome(seed)] += 1
                assert (took := BOUNDED.peak() - before) <= MEMORY, f"took {took} bytes"
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic in Rust is no Exception
                failed += 1
                frame = error.__traceback__
                while frame is not None and frame.tb_next is not None:
                    frame = frame.tb_next
                line = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
                print(f"{name}: seed {seed}: {type(error).__name__}: {str(error)[:150]} at {line}", flush=True)
    seconds = round(time.process_time() - begun, 1)
    print(json.dumps({"format": name, "first": first, "inputs": count, **found, "failed": failed, "cpu": seconds}))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
