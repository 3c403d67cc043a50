"""Everything written to disk: folders with a manifest, tensor files, JSON, locks, fingerprints.

A reader sees a whole artifact or none. Writing goes to a hidden sibling `.{name}.partial-{pid}`, is flushed to the
disk and takes its name by one rename; what a killed process left behind is cleared when the same path is written
again. `manifest.json` is written last and lists the size and sha256 of every file beside it, so that a load needs
the path alone and notices every missing, cut or changed file. Whatever is wrong with a file is an `ArtifactError`.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from importlib import metadata as packages
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.disk import disk_errors, exchange, sync
from distill.fingerprint import ArtifactError as ArtifactError
from distill.fingerprint import fingerprint as fingerprint
from distill.lock import check_unlocked, held_file
from distill.lock import lock as lock
from distill.partial import aside_of, partial_of, sweep
from distill.partial import clear_leftovers as clear_leftovers
from distill.seal import SEAL, check_seal, seal_of

FORMAT_VERSION = 1
KINDS = ("model", "tokens", "circuit", "bridge", "report", "run")
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 2**20
_PACKAGES = ("distill-bridges", "torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an artifact comes from; format version and library versions are added on writing."""

    kind: str
    """One of `KINDS`."""
    command: str
    """The command that made it, as a person would type it."""
    config: dict[str, Any]
    """The resolved configuration."""
    seed: int | None
    """Seed of every random choice, None where there is none."""
    data: str | None
    """Fingerprint of the data, None where there is none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else worth knowing."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArtifactError(f"kind: got {self.kind!r}, allowed are {', '.join(KINDS)}")

    def record(self) -> dict[str, Any]:
        """The fields as a dict, for `save_tensors(path, tensors, {**provenance.record(), ...})`."""
        return {name: getattr(self, name) for name in ("kind", "command", "config", "seed", "data", "extra")}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result; "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = "not installed"
        with suppress(packages.PackageNotFoundError):
            found[name] = packages.version(name)
    return found


def default_out(name: str) -> Path:
    """The output folder of a recipe that was given no `--out`: `runs/{name}`."""
    return Path("runs") / name


@contextmanager
def fresh_folder(path: str | Path, provenance: Provenance, *, replace: bool = False) -> Iterator[Path]:
    """Fill a new folder that appears at `path` whole, or not at all.

    Arguments:
        path: where the folder shall stand; its parents are made.
        provenance: goes into the manifest, which is written after the body has ended.
        replace: swap out an earlier artifact of the same kind (with all that lies in it) in one step.

    Yields a temporary sibling to write into. Any exception, Ctrl-C included, removes it and leaves `path` as it was.
    Raises `ArtifactError` when `path` exists and `replace` is off, when it is no artifact of this kind (nothing else
    is ever deleted), when this or another process already writes it, or when the body left a link or its own manifest;
    `OSError` when the disk is full, whatever a library calls it.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if (writer := sweep(path)) not in (0, os.getpid()):
        raise ArtifactError(f"{path}: is being written by another run (process {writer})")
    check_free(path, provenance.kind, replace=replace)
    partial, owner = partial_of(path), os.getpid()
    try:
        partial.mkdir()
    except FileExistsError:
        raise ArtifactError(f"{path}: this process is already writing it") from None
    with _claimed(partial):
        with disk_errors(path):
            yield partial
        if os.getpid() != owner:
            raise ArtifactError(f"{path}: is finished by the process that began it ({owner}), not by its child")
        if (partial / MANIFEST).exists():
            raise ArtifactError(f"{path}: {MANIFEST} is written by the folder itself, choose another file name")
        write_manifest(partial, provenance)
        for folder, _, names in os.walk(partial):
            for entry in (*(Path(folder) / name for name in names), Path(folder)):
                sync(entry)
        check_free(path, provenance.kind, replace=replace)
        if path.exists():
            exchange(partial, path, aside_of(path))
        else:
            os.rename(partial, path)
        sync(path.parent)


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Hold a folder that is being filled, so that others can tell; what lies at its name in the end goes."""
    owner = os.getpid()
    with held_file(os.open(partial, os.O_RDONLY)) as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # After a swap the earlier artifact lies here; after a failure, what the body wrote.
            if os.getpid() == owner:  # not in a child that was forked meanwhile
                shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: str | Path, provenance: Provenance) -> None:
    """Write (anew) the manifest of a folder that grows in place, such as a training run; see `fresh_folder`.

    Lists every file but hidden ones (`.lock`). Raises `ArtifactError` for a link, which would not travel.
    """
    folder = Path(folder)
    files = {}
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        if entry.is_symlink():
            raise ArtifactError(f"{folder}: {name} is a link, only files and folders can be kept")
        if entry.is_file() and name != MANIFEST and not any(part.startswith(".") for part in PurePosixPath(name).parts):
            files[name] = {"bytes": entry.stat().st_size, "sha256": _sha256(entry)}
    head = {"kind": provenance.kind, "format_version": FORMAT_VERSION, "provenance": provenance.record()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    _write_sealed(folder / MANIFEST, {**head, "versions": versions(), "created": created, "files": files})


def read_manifest(folder: str | Path, kind: str | None = None, verify: bool = True) -> dict[str, Any]:
    """The checked manifest of a folder made by `fresh_folder` or `write_manifest`.

    Arguments:
        folder: the artifact.
        kind: what it must be, one of `KINDS`; None takes any.
        verify: also hash every file (existence and size are always checked).

    Raises `ArtifactError` for a missing folder or manifest, another kind, a newer format, a name that leads out of
    the folder, and a file that is missing or not as it was written.
    """
    folder = Path(folder)
    manifest = _read_head(folder, kind)
    for name, entry in manifest["files"].items():
        _check_file(folder, name, entry, verify)
    check_seal(folder / MANIFEST, manifest, "manifest")
    return manifest


def read_head(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a folder whose files may have changed since, as while a run goes on: none is looked at.

    Raises `ArtifactError` as `read_manifest`, but for the files.
    """
    manifest = _read_head(Path(folder), kind)
    check_seal(Path(folder) / MANIFEST, manifest, "manifest")
    return manifest


def _read_head(folder: Path, kind: str | None) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    path = folder / MANIFEST
    manifest = read_json(path, what="manifest")
    _check_head(path, manifest, kind)
    if manifest["kind"] not in KINDS:
        raise ArtifactError(f"{path}: kind {manifest['kind']!r}, known are {', '.join(KINDS)}")
    if not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path}: 'files' must be an object of file names")
    known = manifest.get("provenance")
    if not isinstance(known, dict) or not all(isinstance(known.get(name, {}), dict) for name in ("config", "extra")):
        raise ArtifactError(f"{path}: 'provenance' must be an object, and 'config' and 'extra' in it")
    return manifest


def check_listed(folder: str | Path, *names: str) -> None:
    """Refuse files that are not what the manifest of their folder lists; those that it does not list are not looked at.

    Raises `ArtifactError` as `read_manifest`; does nothing where there is no manifest.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        files = read_head(folder)["files"]
        for name in names:
            if name in files:
                _check_file(folder, name, files[name], verify=True)


def remove_folder(path: str | Path, kind: str) -> None:
    """Delete an artifact of this kind (for `--overwrite`).

    Raises `ArtifactError` for anything else, and for a folder that another run holds (`lock`), untouched.
    """
    path = Path(path).resolve()
    if path.exists():
        check_free(path, kind, replace=True)
        check_unlocked(path)
        aside = partial_of(path)
        os.rename(path, aside)  # one step: a kill midway leaves a partial, never half an artifact
        shutil.rmtree(aside)


def check_free(path: str | Path, kind: str, *, replace: bool) -> None:
    """Refuse a path that is taken; with `replace`, one that is not an earlier artifact of this kind."""
    path = Path(path)
    check_room(path)
    if not path.exists():
        return
    if not replace:
        raise ArtifactError(f"{path}: exists already, choose another folder or ask to overwrite it")
    if not path.is_dir():
        raise ArtifactError(f"{path}: is no folder and will not be overwritten")
    if not any(path.iterdir()):
        return
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path}: will not be overwritten, it holds files but no {MANIFEST}, so it is not ours")
    _check_head(path / MANIFEST, read_json(path / MANIFEST, what="manifest"), kind)


def check_room(path: str | Path) -> None:
    """Refuse, before any work, a path that nothing can be written to: below a file, or in a folder that is closed."""
    path = Path(path).absolute()
    there = next(parent for parent in path.parents if parent.exists())
    if not there.is_dir():
        raise ArtifactError(f"{path}: {there} is a file, so nothing can be written in it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArtifactError(f"{path}: nothing can be written in {there} (read-only file system, or not yours)")


def _check_head(path: Path, head: Any, kind: str | None) -> None:
    """Refuse a head (manifest or tensor metadata) of unknown shape, a newer format or another kind."""
    if not isinstance(head, dict) or not isinstance(head.get("kind"), str):
        raise ArtifactError(f"{path}: holds no 'kind', so it is no artifact of distill-bridges")
    _check_version(path, head.get("format_version"))
    if kind is not None and head["kind"] != kind:
        raise ArtifactError(f"{path}: is of kind {head['kind']!r}, needed is {kind!r}")


def _check_version(path: Path, version: Any) -> None:
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{path}: format_version {version!r}, allowed are 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ArtifactError(f"{path}: format {version} is newer than {FORMAT_VERSION}, the newest this version reads")


def _check_file(folder: Path, name: str, entry: Any, verify: bool) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or "\\" in name or not parts.parts:
        raise ArtifactError(f"{folder / MANIFEST}: file name {name!r} leads out of the folder")
    path = folder / name
    try:
        leads_out, there = not path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, RuntimeError) as error:  # too long for a name, or a circle of links
        raise ArtifactError(f"{folder / MANIFEST}: {name[:60]!r} is no file name ({type(error).__name__})") from None
    if leads_out:
        raise ArtifactError(f"{folder / MANIFEST}: file {name!r} is a link out of the folder")
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
        raise ArtifactError(f"{folder / MANIFEST}: entry of {name!r} must hold 'bytes' and 'sha256'")
    if not there:
        raise ArtifactError(f"{path}: is missing, the manifest lists it")
    if path.stat().st_size != entry["bytes"]:
        raise ArtifactError(f"{path}: has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
    if verify and _sha256(path) != entry["sha256"]:
        raise ArtifactError(f"{path}: its sha256 is not the one in the manifest, the file was changed or damaged")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON in one step, keys in the given order; paths, dataclasses and numpy scalars are made plain.

    Raises `ArtifactError` for NaN and infinities, which JSON cannot hold, and for a value nested in itself.
    """
    write_text(path, _as_json(path, value, indent=1) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) in one step: whole, or what was there stays."""
    with _fresh_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def _as_json(path: str | Path, value: Any, *, indent: int | None = None, what: str = "") -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=_plain)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {what}cannot be written as JSON: {error}") from None


def _sealed(path: str | Path, value: Mapping[str, Any], what: str = "") -> dict[str, Any]:
    """The object as it will be read back, with its seal."""
    plain = json.loads(_as_json(path, value, what=what))
    return {**plain, SEAL: seal_of(plain)}


def _write_sealed(path: str | Path, record: Mapping[str, Any]) -> None:
    write_json(path, _sealed(path, record))


def read_json(path: str | Path, *, what: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read JSON that somebody else may have written.

    Arguments:
        what: what the file should be, for the message ("manifest", "task").
        max_bytes: largest size taken.

    Raises `ArtifactError` for a file that is missing, too large, not UTF-8, not JSON (NaN is not), or nested too deep.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such {what} file")
    if path.stat().st_size > max_bytes:
        raise ArtifactError(f"{path}: {what} of {path.stat().st_size} bytes, allowed are {max_bytes}")
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ArtifactError(f"{path}: {what} is nested too deep") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: {what} is not JSON: {error}") from None


def write_record(path: str | Path, record: Mapping[str, Any], *, seal: bool = True) -> None:
    """`write_json` of an object that is to be read back, its format version first, its seal last.

    Without `seal` a person may edit the file.
    """
    versioned = {"format_version": FORMAT_VERSION, **record}
    _write_sealed(path, versioned) if seal else write_json(path, versioned)


def read_record(path: str | Path, *, what: str) -> dict[str, Any]:
    """What `write_record` wrote, without version and seal; one that has no version is of version 1.

    Raises `ArtifactError` as `read_json`, for what is no object or of a version that is not read, and for one that was
    changed since it was sealed.
    """
    record = read_json(path, what=what)
    if not isinstance(record, dict):
        raise ArtifactError(f"{path}: is no {what}, which is a JSON object")
    _check_version(Path(path), record.pop("format_version", 1))
    check_seal(path, record, what)
    record.pop(SEAL, None)
    return record


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and their description to one safetensors file, in one step.

    Arguments:
        tensors: name to dense tensor; views and shared storages are written out, each in full.
        metadata: JSON values, `kind` among them (any word); format version, versions, a fingerprint of the tensors and
            a seal of all of these are added.

    Raises `ArtifactError` without a kind, for a sparse tensor, and for metadata that JSON cannot hold.
    """
    if not isinstance(metadata.get("kind"), str):
        raise ArtifactError(f"{path}: metadata.kind must be a word that says what the file is")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ArtifactError(f"{path}: tensor {name!r} has layout {tensor.layout}, only dense ones can be written")
    # Cloned, because safetensors refuses tensors that share memory (tied weights, expanded views).
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    added = {"format_version": FORMAT_VERSION, "versions": versions(), "sha256": fingerprint(whole)}
    head = json.dumps(_sealed(path, {**metadata, **added}, "metadata "))
    with _fresh_file(Path(path)) as partial:
        save_file(whole, partial, metadata={"distill": head})


def load_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and metadata of a file by `save_tensors`.

    Arguments:
        kind: what the file must be.

    Raises `ArtifactError` for a file that is missing, cut, damaged, of another kind or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such {kind} file")
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get("distill", "null"), parse_constant=_refuse_constant)
            _check_head(path, head, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except ArtifactError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is no readable {kind} file: {error}") from None
    if fingerprint(tensors) != head.get("sha256"):
        raise ArtifactError(f"{path}: its tensors are not the ones that were written, the file was changed or damaged")
    check_seal(path, head, f"{kind} file")
    head.pop(SEAL, None)
    return tensors, head


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one JSON object as a line (`metrics.jsonl`). A line that a killed process left half written is dropped.

    Raises `ArtifactError` for NaN and infinities.
    """
    line = _as_json(path, record).encode() + b"\n"
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)


@contextmanager
def _fresh_file(path: Path) -> Iterator[Path]:
    """A sibling to write to, which takes the name `path` when the body ends well."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    partial = partial_of(path)
    try:
        with disk_errors(path):
            yield partial
        # Some writers make files that only their owner may read; what we leave is as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _plain(value: Any) -> Any:
    """What JSON makes of the few other types that configurations hold."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
