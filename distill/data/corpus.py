"""Text to train on: read from named sources, cleaned of duplicates, split into train and held-out by file.

A source is a short string: `stdlib`, `package:NAME`, `idioms:MEGABYTES`, a folder path (or `folder:PATH`),
`lines:FILE`, or `hf:NAME[:CONFIG][@SPLIT][#COLUMN]`. Each yields documents with a name that does not depend on where on
the disk they lie; the split and the order of the documents follow from a hash of that name with the seed, so that
adding a source or a file moves no other document to the other side (unless that side would be empty). Each line of
`lines:FILE` is a document that is never run together with another: sequences of one length, for models that take such
inputs only.
"""

import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.artifact import fingerprint
from distill.data import idioms

ALLOWED_SOURCES = (
    "stdlib, package:NAME, idioms:MEGABYTES, a folder, folder:PATH, lines:FILE, hf:NAME[:CONFIG][@SPLIT][#COLUMN]"
)
TEXT_PATTERNS = ("*.py", "*.txt", "*.md")
TEXT_COLUMNS = ("text", "content")
UNKNOWN_LICENCE = "unknown"
_STDLIB_LICENCE = "PSF-2.0"
_LINES = "lines:"

_TEST_FOLDERS = frozenset({"test", "tests", "__pycache__", "site-packages", "dist-packages"})
_TEST_FILES = ("test_*.py", "*_test.py", "conftest.py")
# Left out besides the tests: what distributions strip, and what a build writes with its own paths.
_STDLIB_FOLDERS = frozenset({"idlelib", "turtledemo", "lib-dynload"})
_STDLIB_FILES = ("_sysconfigdata_*.py", "_sysconfig_vars_*.py", "python-config.py")


@dataclass(frozen=True)
class Document:
    """One file, one row of a dataset or one generated text."""

    name: str
    """Where it lies within its source, the source's short name first: `stdlib/json/decoder.py`."""
    text: str
    """The whole text, never blank."""
    source: str
    """The source as it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on and documents held out, each in the order of a hash of the name."""

    train: list[Document]
    """At least one document."""
    heldout: list[Document]
    """At least one document, none when the held-out fraction is 0."""
    heldout_fraction: float
    """Expected share of the documents held out."""
    seed: int
    """Seed of the split, of the order and of generated text."""
    separate: bool = False
    """Whether each document is a sequence of its own, as in `lines:FILE`, not to be run together with others."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """One record per source: source, licence, files, bytes, duplicates and undecodable (both left out)."""

    def record(self) -> dict[str, Any]:
        """What an artifact should remember of the text it was made from, fit for JSON.

        Returns: sources (one record each), licences, files and bytes (UTF-8) of both sides together and of the
        held-out side, heldout_fraction, seed, and the fingerprint (sha256 of all names and texts and their side).
        """
        held = sum(_size(document) for document in self.heldout)
        return {
            "sources": self.sources,
            "licences": sorted({source["licence"] for source in self.sources}),
            "files": len(self.train) + len(self.heldout),
            "heldout_files": len(self.heldout),
            "bytes": sum(_size(document) for document in self.train) + held,
            "heldout_bytes": held,
            "heldout_fraction": self.heldout_fraction,
            "seed": self.seed,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """sha256 (hex) of every name and text, by side."""
        return fingerprint(
            {
                side: {_digest(document.text): document.name for document in documents}
                for side, documents in (("train", self.train), ("heldout", self.heldout))
            }
        )


@dataclass
class _Reading:
    """A source while it is read: where its documents come from, and what was counted on the way."""

    source: str
    licence: str
    documents: Iterator[tuple[str, str | None]]
    """Names with their text, None for a file that is not UTF-8."""


def read_corpus(
    sources: Sequence[str], *, heldout_fraction: float = 0.05, seed: int = 0, max_bytes: int | None = None
) -> Corpus:
    """Read sources, drop blank and repeated texts, and split by document.

    Arguments:
        sources: one or more sources, see the module's docstring. `stdlib` and `package:` take `.py` files without
            tests, a folder takes `.py`, `.txt` and `.md` below it (hidden folders left out), `lines:` takes the
            lines of a file. Files that are not UTF-8 are counted and left out; line ends are made `\\n`.
        heldout_fraction: share of the documents to hold out, at least 0 and less than 1. Above 0, at least one
            document is held out.
        seed: of the split, the order and the generated text; 0 or above.
        max_bytes: keep documents, in the order of their hash, while they fit into this many bytes of UTF-8;
            None keeps all. A dataset is then streamed, and no more of it is read than this.

    Returns the corpus.
    Raises ValueError for an unknown source, package, folder, file or column, lines beside other sources, a setting out
    of range, no text at all, and a single document that would have to be split.
    """
    if isinstance(sources, str) or not sources:
        raise ValueError(f"sources: got {sources!r}, needed is a list of one or more of: {ALLOWED_SOURCES}")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction: got {heldout_fraction}, allowed is 0 up to, not including, 1")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, allowed are 0 and above")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: got {max_bytes}, allowed are 1 and above")
    separate = [source.startswith(_LINES) for source in sources]
    if any(separate) and not all(separate):
        raise ValueError(f"sources: got {', '.join(sources)}; allowed beside lines: is lines: alone")
    readings = [_reading(source, seed, max_bytes) for source in dict.fromkeys(sources)]
    documents, counts = _collect(readings)
    if not documents:
        raise ValueError(f"sources: {', '.join(sources)} hold no text")
    documents.sort(key=lambda document: (_place(document.name, seed, "order"), document.name))
    documents = _capped(documents, max_bytes)
    held = _held_out([_place(document.name, seed, "side") for document in documents], heldout_fraction)
    return Corpus(
        train=[document for document, out in zip(documents, held, strict=True) if not out],
        heldout=[document for document, out in zip(documents, held, strict=True) if out],
        heldout_fraction=heldout_fraction,
        seed=seed,
        separate=all(separate),
        sources=[_source_record(reading, documents, counts[reading.source]) for reading in readings],
    )


def _collect(readings: Sequence[_Reading]) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """All documents with text, each text once; per source how many were left out and why."""
    seen: set[str] = set()
    documents: list[Document] = []
    counts = {reading.source: {"duplicates": 0, "undecodable": 0} for reading in readings}
    for reading in readings:
        for name, text in tqdm(reading.documents, desc=f"read {reading.source}", unit=" files", delay=2, disable=None):
            if text is None:
                counts[reading.source]["undecodable"] += 1
            elif text.strip():
                digest = _digest(text)
                if digest in seen:  # a copy on the other side would make the held-out loss a lie
                    counts[reading.source]["duplicates"] += 1
                    continue
                seen.add(digest)
                documents.append(Document(name, text, reading.source))
    return documents, counts


def _capped(documents: list[Document], max_bytes: int | None) -> list[Document]:
    if max_bytes is None:
        return documents
    kept, used = [], 0
    for document in documents:
        if used + _size(document) <= max_bytes:
            kept.append(document)
            used += _size(document)
    if not kept:
        smallest = min(_size(document) for document in documents)
        raise ValueError(f"max_bytes: got {max_bytes}, the smallest document has {smallest}")
    return kept


def _held_out(places: Sequence[float], fraction: float) -> list[bool]:
    """Which documents are held out: those below the fraction, but at least one, and never all."""
    if fraction == 0:
        return [False] * len(places)
    if len(places) == 1:
        raise ValueError(
            f"heldout_fraction: got {fraction}, but there is a single document and the split is by document; "
            "allowed is 0, or give the text as several files"
        )
    border = min(fraction, max(places))
    held = [place < border for place in places]
    return held if any(held) else [place == min(places) for place in places]


def _source_record(reading: _Reading, documents: Sequence[Document], counts: dict[str, int]) -> dict[str, Any]:
    own = [document for document in documents if document.source == reading.source]
    size = sum(_size(document) for document in own)
    return {"source": reading.source, "licence": reading.licence, "files": len(own), "bytes": size, **counts}


def _place(name: str, seed: int, purpose: str) -> float:
    """Where a name falls in [0, 1), evenly spread."""
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _size(document: Document) -> int:
    return len(document.text.encode())


# --- sources ---------------------------------------------------------------------------------------------------------


def _reading(source: str, seed: int, max_bytes: int | None) -> _Reading:
    kind, colon, rest = source.partition(":")
    if source == "stdlib":
        return _Reading(source, _STDLIB_LICENCE, _stdlib())
    if colon and kind == "package":
        return _Reading(source, _licence(rest), _package(source, rest))
    if colon and kind == "idioms":
        return _Reading(source, "MIT", _idioms(source, rest, seed))
    if colon and kind == "hf":
        return _Reading(source, UNKNOWN_LICENCE, _hugging_face(source, max_bytes))
    if source.startswith(_LINES):
        return _Reading(source, UNKNOWN_LICENCE, _lines(source, Path(rest)))
    folder = Path(rest if colon and kind == "folder" else source)
    if not folder.is_dir():
        problem = "no such folder" if kind == "folder" or os.sep in source else "unknown source"
        raise ValueError(f"source {source!r}: {problem}; allowed are {ALLOWED_SOURCES}")
    return _Reading(source, UNKNOWN_LICENCE, _folder(folder))


def reading(source: str, seed: int) -> Iterator[tuple[str, str | None]]:
    """Names and texts of a source as `read_corpus` takes it, None for a text that is not UTF-8; same errors.

    ValueError for `lines:FILE` too, whose documents are not to be run together.
    """
    if source.startswith(_LINES):
        raise ValueError(f"source {source!r}: lines are not streamed; allowed is to pack them, without --stream")
    return _reading(source, seed, None).documents


def side_of(text: str, seed: int) -> float:
    """Where a text falls in [0, 1), for splits by text: equal texts fall on the same side."""
    return _place(_digest(text), seed, "side")


def _stdlib() -> Iterator[tuple[str, str | None]]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = _TEST_FOLDERS | _STDLIB_FOLDERS
    for path in _files(root, ("*.py",), skip, (*_TEST_FILES, *_STDLIB_FILES)):
        yield f"stdlib/{path.relative_to(root).as_posix()}", _text(path)


def _package(source: str, name: str) -> Iterator[tuple[str, str | None]]:
    """An installed package's own files. Looked up at once, so that a wrong name is told before anything is read."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise ValueError(
            f"source {source!r}: no package {name!r} is installed; allowed is an importable top-level name"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    if roots:
        return _package_files(name, roots)
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"source {source!r}: {name!r} is built in and has no Python source; allowed is a package")
    return iter([(f"{name}.py", _text(Path(spec.origin)))])


def _package_files(name: str, roots: Sequence[Path]) -> Iterator[tuple[str, str | None]]:
    for root in roots:
        for path in _files(root, ("*.py",), _TEST_FOLDERS, _TEST_FILES):
            yield f"{name}/{path.relative_to(root).as_posix()}", _text(path)


def _licence(package: str) -> str:
    """The licence that a package's metadata names: its expression, else its classifiers, else a first line."""
    if package in sys.stdlib_module_names:
        return _STDLIB_LICENCE
    distributions = metadata.packages_distributions().get(package)
    if not distributions:
        return UNKNOWN_LICENCE
    about = metadata.metadata(distributions[0])
    if "License-Expression" in about:
        return about["License-Expression"]
    named = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or [] if line.startswith("License :: ")]
    first = about["License"].strip().partition("\n")[0].strip() if "License" in about else ""
    return ", ".join(named) or first[:100] or UNKNOWN_LICENCE


def _folder(root: Path) -> Iterator[tuple[str, str | None]]:
    name = root.resolve().name
    for path in _files(root, TEXT_PATTERNS, frozenset({"__pycache__"}), ()):
        yield f"{name}/{path.relative_to(root).as_posix()}", _text(path)


def _lines(source: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """The lines of a file, named after their text: equal lines, in whatever order, fall on the same side."""
    if not path.is_file():
        raise ValueError(f"source {source!r}: no such file; allowed is a text file with a sequence on each line")
    text = _text(path)
    if text is None:
        raise ValueError(f"source {source!r}: is not UTF-8; allowed is a text file with a sequence on each line")
    return ((f"{path.name}/{line}", line) for line in text.split("\n") if line)


def _files(root: Path, patterns: Sequence[str], folders: frozenset[str], names: Sequence[str]) -> Iterator[Path]:
    """Files below root by pattern, in the order of their names, without those folders, names and hidden folders."""
    for place, below, files in os.walk(root):
        below[:] = sorted(folder for folder in below if folder not in folders and not folder.startswith("."))
        for name in sorted(files):
            wanted = any(fnmatch(name, pattern) for pattern in patterns)
            if wanted and not any(fnmatch(name, pattern) for pattern in names):
                yield Path(place, name)


def _text(path: Path) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _idioms(source: str, megabytes: str, seed: int) -> Iterator[tuple[str, str | None]]:
    try:
        wanted = float(megabytes) * 1e6
    except ValueError:
        wanted = -1.0
    if not 0 < wanted < 1e12:
        raise ValueError(f"source {source!r}: got {megabytes!r} megabytes, allowed is a number above 0")
    return _generated(wanted, seed)


def _generated(wanted: float, seed: int) -> Iterator[tuple[str, str | None]]:
    made = 0
    for index, text in enumerate(idioms.documents(seed)):
        yield f"idioms/{index}", text
        made += len(text)  # the grammar writes ASCII
        if made >= wanted:
            return


def _hugging_face(source: str, max_bytes: int | None) -> Iterator[tuple[str, str | None]]:
    """Rows of a dataset's text column; opened at once, so that a wrong name or column is told at once."""
    data, column, prefix = open_dataset(source, streaming=max_bytes is not None)
    return _rows(source, prefix, data, column, max_bytes)


def open_dataset(source: str, *, streaming: bool) -> tuple[Any, str, str]:
    """A dataset of Hugging Face, on the hub or in a folder of JSON lines, parquet or text files.

    Arguments:
        source: hf:NAME[:CONFIG][@SPLIT][#COLUMN].
        streaming: whether its rows are fetched one after the other, as they are asked for.

    Returns the dataset with the text column alone, the name of that, and a prefix for the names of its rows. Raises
    ValueError in one line for a dataset, split or column that is not there, and a hub out of reach.
    """
    from datasets import load_dataset  # takes a second to import, and most corpora do not need it
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    address, _, column = source.removeprefix("hf:").partition("#")
    address, _, split = address.partition("@")
    name, _, config = address.partition(":")
    if not name:
        raise ValueError(f"source {source!r}: no dataset is named; allowed is hf:NAME[:CONFIG][@SPLIT][#COLUMN]")
    split = split or "train"
    try:
        data = load_dataset(name, config or None, split=split, streaming=streaming)
    except DatasetNotFoundError:
        raise ValueError(f"source {source!r}: no dataset {name!r} was found on the hub or as a folder") from None
    except ConnectionError as error:
        raise ValueError(f"source {source!r}: the hub cannot be reached: {_one_line(error)}") from None
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"source {source!r}: {_one_line(error)}") from None
    columns = list(data.column_names or data.features or ())
    column = column or next((guess for guess in TEXT_COLUMNS if guess in columns), "")
    if column not in columns:
        got = f"has no column {column!r}" if column else f"has no column named {' or '.join(TEXT_COLUMNS)}"
        raise ValueError(f"source {source!r}: {got}, add #COLUMN; allowed are {', '.join(columns)}")
    short = Path(name).name if Path(name).is_dir() else name
    return data.select_columns([column]), column, f"{short}/{config or 'default'}/{split}"


def _rows(source: str, prefix: str, data: Any, column: str, max_bytes: int | None) -> Iterator[tuple[str, str | None]]:
    read = 0
    for index, row in enumerate(data):
        text = text_of(row, column, source)
        yield f"{prefix}/{index}", text
        read += len(text.encode())
        if max_bytes is not None and read > max_bytes:
            return


def text_of(row: Mapping[str, Any], column: str, source: str) -> str:
    """The text of a row of a dataset; ValueError where the column holds something else."""
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"source {source!r}: column {column!r} holds {type(text).__name__}, needed is text")
    return text.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair, UTF-8 cannot


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
