"""A watch over a stream of text, and the report of how well a watch tells."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.circuits.circuit import Circuit
from distill.circuits.code_labels import LabelledCode
from distill.circuits.colour import as_html, as_page, in_terminal, token_pieces
from distill.circuits.detection import CodeScore, on_code, on_prompts, probe_code, random_watches
from distill.circuits.subject import Subject
from distill.circuits.tasks import SPLITS, Task, encode
from distill.circuits.watch import Watch
from distill.model.run import Runnable

Record = dict[str, Any]
RATES = (0.01, 0.05, 0.1, 0.2)
"""Rates of flags on the corpus at which delays are reported, beside the watch's own."""


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
    circuit: Circuit | None = None,
    controls: int = 20,
    pairs: int = 64,
    seed: int = 0,
) -> Record:
    """How well a watch tells, as plain JSON values.

    Arguments:
        watch: over `subject`'s model, calibrated on the first windows of its sample; the rest is used here.
        code: labelled held-out code; its first half fits the probes, the second one judges probes and watches alike.
        circuit: of the same model, for random nodes like its own; none: no such reference.
        controls: random node sets.
        pairs: of prompts per split.
    """
    model, windows = subject.model, int(watch.provenance["windows"])
    known = watch.of(watch.score(model, subject.sample[:windows, :-1])).flatten().double()
    thresholds = {rate: float(torch.quantile(known, 1 - rate)) for rate in sorted({*RATES, watch.fpr})}
    rest = subject.sample[windows : 2 * windows]
    if not len(rest):
        raise ValueError(f"corpus: all of the {len(subject.sample)} held-out windows went into the calibration")
    corpus = watch.score(model, rest[:, :-1])
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
        if circuit is not None:
            random = random_watches(subject, circuit, task, watch, count=controls, seed=seed)
            found["random"] = [
                vars(CodeScore.of(one.score(model, test.tokens[:, :-1]), test.inside[:, :-1])) for one in random
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


def texts_of(source: str) -> Iterable[str]:
    """The pieces of a text that is given as it is, as a file, or as - for the lines of the standard input."""
    if source == "-":
        return sys.stdin
    try:
        file = Path(source).is_file()
    except OSError:
        file = False  # too long for the name of a file
    return [Path(source).read_text(encoding="utf-8") if file else source]


def show(records: Iterable[Record], watch: Watch, *, colour: bool, page: Path | None) -> None:
    """Prints records as they come, as JSON lines or as coloured text, and writes a page of them where asked to."""
    pieces, values = [], []
    for record in records:
        pieces.append(record["token"])
        values.append(record[watch.signal])
        if colour:
            print(in_terminal(pieces[-1:], values[-1:], threshold=watch.threshold), end="", flush=True)
        else:
            print(json.dumps(record), flush=True)
    if page is not None:
        fragment = as_html(pieces, values, threshold=watch.threshold)
        note = f"{watch.signal} of every token; outlined above {watch.threshold:.3f}"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(as_page(fragment, title=f"{watch.task} in {watch.model_name}", note=note), encoding="utf-8")
