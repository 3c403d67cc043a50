"""A watch over a stream of text, and the report of how well a watch tells."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.artifact import check_room, write_text
from distill.circuits.ablation import windows_fingerprint
from distill.circuits.code_labels import LabelledCode
from distill.circuits.colour import as_html, as_page, in_terminal, token_pieces
from distill.circuits.detection import CodeScore, on_code, on_prompts, probe_code
from distill.circuits.subject import Subject
from distill.circuits.tasks import SPLITS, Task, encode
from distill.circuits.watch import Watch, calibration_rows, check_flags, check_name
from distill.model.run import Runnable

Record = dict[str, Any]
RATES = (0.01, 0.05, 0.1, 0.2)
"""Rates of flags on the corpus at which delays are reported, beside the watch's own."""
TEXT_SUFFIXES = (".py", ".txt", ".md")
"""Endings by which what is no file's name yet can be nothing else."""


def watched(
    watch: Watch, model: Runnable, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> Iterator[Record]:
    """A record for each token of a stream of text that comes in pieces (lines, say): token, id, strength, lean, flag.

    Pieces are tokenized one by one. Each is read behind the last half of the model's context, so every token but the
    first ones sees at least as much. CircuitMismatchError for another model than the watch's.
    """
    watch.check(model)
    behind = model.context // 2
    known: list[int] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert isinstance(ids, list)
        for start in range(0, len(ids), behind):
            part = ids[start : start + behind]
            yield from _records(watch, model, tokenizer, known[-behind:], part)
            known = [*known, *part][-behind:]


@torch.no_grad()
def _records(
    watch: Watch, model: Runnable, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], part: Sequence[int]
) -> Iterator[Record]:
    device = next(model.parameters()).device
    gauge = watch.gauge()
    model.run(torch.tensor([[*before, *part]], device=device), tap=gauge, stop="final_resid")
    scores = watch.scores(gauge.take()[0, len(before) :])
    flags = watch.flags(scores)
    for place, (one, piece) in enumerate(zip(part, token_pieces(part, tokenizer), strict=True)):
        yield {
            "token": piece,
            "id": one,
            "strength": round(float(scores.strength[place]), 4),
            "lean": round(float(scores.lean[place]), 4),
            "flag": bool(flags[place]),
        }


def evaluation(
    watch: Watch,
    subject: Subject,
    task: Task,
    *,
    code: LabelledCode | None = None,
    random: Callable[[int], Sequence[Watch]] | None = None,
    controls: int = 20,
    pairs: int = 64,
    seed: int = 0,
) -> Record:
    """How well a watch tells, as plain JSON values.

    Arguments:
        watch: over `subject`'s model, calibrated on some windows of its sample; as many others are used here.
        code: labelled held-out code; its first half fits the probes, the second one judges probes and watches alike.
        random: makes so many watches over random nodes, the lower reference; none: no such reference.
        controls: how many.
        pairs: of prompts per split.

    ValueError for a watch that was calibrated on another sample, and a sample of one window.
    """
    model = subject.model
    used, others = calibration_rows(len(subject.sample), int(watch.provenance["windows"]))
    if watch.data != windows_fingerprint(subject.sample[used, :-1]):
        raise ValueError("corpus: the watch was calibrated on other windows than this model's sample holds")
    if not len(others):
        raise ValueError(f"corpus: all of the {len(subject.sample)} held-out windows went into the calibration")
    known = watch.of(watch.score(model, subject.sample[used, :-1])).flatten().double()
    thresholds = {rate: float(torch.quantile(known, 1 - rate)) for rate in sorted({*RATES, watch.fpr})}
    rest = others[torch.linspace(0, len(others) - 1, min(len(used), len(others))).round().long()]
    corpus = watch.score(model, subject.sample[rest, :-1])
    found: Record = {
        "watch": {"signal": watch.signal, "fpr": watch.fpr, "threshold": watch.threshold, "nodes": len(watch.names)},
        "rates": {f"{rate:g}": float((watch.of(corpus) > one).double().mean()) for rate, one in thresholds.items()},
        "splits": {},
    }
    for split in SPLITS[1:]:
        if split in task.splits:
            batch = encode(task, subject.tokenizer, split, pairs, seed, context=model.context)
            found["splits"][split] = on_prompts(watch, model, batch, corpus, thresholds)
    if code is not None:
        half = len(code.tokens) // 2
        fit, test = code.part(slice(0, half)), code.part(slice(half, None))
        found["code"] = on_code(watch, model, test, thresholds)
        found["probe"] = probe_code(model, fit, test)
        if random is not None:
            found["random"] = [
                vars(CodeScore.of(one.score(model, test.tokens[:, :-1]), test.inside[:, :-1]))
                for one in random(controls)
            ]
    return found


def report(found: Mapping[str, Any]) -> str:
    """The evaluation for a person."""
    watch, lines = found["watch"], []
    lines.append(f"{watch['nodes']} nodes; {watch['signal']} above {watch['threshold']:.3f} flags {watch['fpr']:.1%}")
    lines.append("areas under the curve:")
    for split, one in found["splits"].items():
        lines.append(f"  {split:8s} at work {one['at_work']:.3f}, which {one['which']:.3f} ({one['prompts']} prompts)")
    if "code" in found:
        one = found["code"]
        lines.append(f"  code     inside {one['inside']:.3f}, which quote {one['which']:.3f} ({one['tokens']} tokens)")
        for name in ("inside", "which"):
            site, best = max(found["probe"].items(), key=lambda item: item[1][name])
            lines.append(f"  probe    {name} {best[name]:.3f} at {site}, the best of {len(found['probe'])} sites")
            values = sorted(one[name] for one in found.get("random", ()))
            if values:
                span = f"{values[0]:.3f} to {values[-1]:.3f}"
                lines.append(f"  random   {name} {values[len(values) // 2]:.3f}, {span} ({len(values)} sets of nodes)")
    lines.append("flags and delay in tokens (median, 9 in 10), by rate of flags on held-out text:")
    for rate, heldout in found["rates"].items():
        parts = [f"{name} {_delay(one['rates'][rate]['delay'])}" for name, one in found["splits"].items()]
        if "code" in found:
            one = found["code"]["rates"][rate]
            parts.append(
                f"code {_delay(one['delay'])}, tokens inside {one['inside']:.1%}, outside {one['outside']:.1%}"
            )
        lines.append(f"  {float(rate):.0%} (elsewhere {heldout:.1%}): {'; '.join(parts)}")
    return "\n".join(lines)


def _delay(one: Mapping[str, Any]) -> str:
    if one["median"] is None:
        return f"in none of {one['stretches']}"
    return f"in {one['found']:.0%} of {one['stretches']} after {one['median']:g}, {one['p90']:g}"


def check_asked(fpr: float, signal: str, *, shown: bool, colour: bool, written: Mapping[str, Path | None]) -> None:
    """ValueError, before anything is loaded, for what will not do.

    Arguments:
        fpr, signal: as in `Watch.calibrated`.
        shown: whether a text is watched, without which there is nothing to colour.
        written: files by option: save, evaluate, html.
    """
    check_flags(fpr, signal)
    for name, asked in (("colour", colour), ("html", written.get("html") is not None)):
        if asked and not shown:
            raise ValueError(f"{name}: there is no text to colour; it goes with --input")
    for name, path in written.items():
        if path is not None and path.is_dir():
            raise ValueError(f"{name}: {path} is a folder; allowed is a file")
        if path is not None:
            check_room(path)
    if (save := written.get("save")) is not None:
        check_name(save)


def texts_of(source: str) -> Iterable[str]:
    """The pieces of a text that is given as it is, as a file, or as - for the lines of the standard input.

    ValueError for an empty text, a folder, what can only be the name of a file that is not there, and what is not UTF-8
    (of the standard input where it is read).
    """
    if source == "-":
        return _lines(sys.stdin)
    if not source:
        raise ValueError("input: is empty; allowed are a text, a file of text, or - for the standard input")
    path = Path(source)
    try:
        file, folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):
        file = folder = False  # too long for a name, or a character that no name can hold
    if folder:
        raise ValueError(f"input: {source!r} is a folder; allowed are a text, a file of text, or -")
    if not file and path.suffix in TEXT_SUFFIXES and not any(letter.isspace() for letter in source):
        raise ValueError(f"input: there is no file {source!r}; if this is the text itself, hand it over by - instead")
    return [_decoded(path) if file else source]


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"input: {path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _lines(stream: Iterable[str]) -> Iterator[str]:
    try:
        yield from stream
    except UnicodeDecodeError as error:
        raise ValueError(f"input: the standard input is not UTF-8 ({error.reason})") from None


def show(records: Iterable[Record], watch: Watch, *, colour: bool, page: Path | None) -> None:
    """Prints records as they come, as JSON lines or as coloured text, and writes a page of them where asked to.

    The page is written where the stream is broken off too; who reads the output may stop at any time.
    """
    pieces: list[str] = []
    values: list[float] = []
    try:
        for record in records:
            piece, value = record["token"], record[watch.signal]
            if page is not None:  # a stream may be without end, and a page is of all of it
                pieces.append(piece)
                values.append(value)
            line = in_terminal([piece], [value], threshold=watch.threshold) if colour else json.dumps(record) + "\n"
            print(line, end="", flush=True)
    except BrokenPipeError:
        # Nobody reads any more (head, a closed pager), so there is nobody to tell; what Python flushes at its end goes
        # nowhere either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if page is not None:
            fragment = as_html(pieces, values, threshold=watch.threshold)
            note = f"{watch.signal} of every token; outlined above {watch.threshold:.3f}"
            write_text(page, as_page(fragment, title=f"{watch.task} in {watch.model_name}", note=note))
