"""Is a circuit at work? A score and a flag for every token of a text, as JSON lines.

    python recipes/monitor.py --circuit FILE --input "print('hello')"
    cat code.py | python recipes/monitor.py --circuit FILE --input - --colour
    python recipes/monitor.py --circuit STUDENTS_CIRCUIT --bridge student --input -      # watches the dense model
    python recipes/monitor.py --circuit FILE --evaluate report.json                      # how well does it tell?

Each line holds token, id, strength (0 to 3: how far the circuit's nodes are from what they usually are), lean (towards
which answer, in logits) and flag (the signal is above what a share --fpr of held-out text exceeds). Over a bridge the
dense model alone runs, read by the encoder rows that the circuit needs. --save keeps the calibrated watch as a file,
which distill.circuits.live plugs into generate; --html writes a page. Expect 10 seconds, or a minute with --evaluate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridges.lineup import NO_BRIDGE
from bridges.monitor import load_watched
from distill import command
from distill.artifact import write_record
from distill.circuits import Circuit
from distill.circuits.code_labels import labelled_code
from distill.circuits.monitor import check_asked, evaluation, report, show, texts_of, watched
from distill.circuits.origin import find_task
from distill.circuits.watch import SIGNALS, Signal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of monitor."""

    circuit: Path
    """File of a circuit (*.circuit.safetensors)."""
    input: str | None = None
    """A text, a file of text, or - for the standard input, which is read line by line."""
    bridge: str = NO_BRIDGE
    """Student with bridges whose dense model is watched: folder of fit_bridges, or a shipped one's short name."""
    fpr: float = 0.05
    """Share of held-out tokens that are flagged."""
    signal: Signal = SIGNALS[0]
    """What flags go by: strength, or lean (its size)."""
    colour: bool = False
    """Print the text coloured by the signal instead of JSON lines."""
    html: Path | None = None
    """File for a page with the coloured text."""
    evaluate: Path | None = None
    """JSON file for areas under the curve and delays, on the task's splits and on held-out code."""
    code: tuple[str, ...] = ("stdlib",)
    """Python sources; --evaluate takes files that the model's training held out. Nothing behind it: splits alone."""
    save: Path | None = None
    """File (*.watch.safetensors) for the calibrated watch."""
    model: tuple[str, ...] = ()
    """Model of the circuit: folder or short name; none: found by what the file and the folder around it say."""
    task: str | None = None
    """Task by name, or a JSONL file of pairs; none: the built-in one that the circuit names."""
    corpus: tuple[str, ...] = ()
    """Text to calibrate on, for models that bring none (see train_sparse)."""
    seed: int = 0
    """Seed of prompts, windows of code and random nodes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def monitor(options: Options) -> None:
    """Calibrate; watch, or evaluate."""
    if options.input is None and options.evaluate is None and options.save is None:
        raise ValueError("input: missing; give a text, a file or -, or one of --evaluate and --save")
    if options.model and options.bridge != NO_BRIDGE:
        raise ValueError("model: the models are those of --bridge; allowed is one of the two")
    written = {"save": options.save, "evaluate": options.evaluate, "html": options.html}
    check_asked(options.fpr, options.signal, shown=options.input is not None, colour=options.colour, written=written)
    texts = None if options.input is None else texts_of(options.input)
    circuit = Circuit.load(options.circuit)
    task, device = find_task(circuit, options.task), str(command.pick_device(options.device))
    given = {name: getattr(options, name) for name in ("bridge", "corpus", "fpr", "signal", "seed")}
    found = load_watched(circuit, options.circuit, task, models=options.model, device=device, **given)
    watch, subject = found.watch, found.subject
    if options.save is not None:
        watch.save(options.save)
    if options.evaluate is not None:
        shape = {"length": min(subject.model.context, 128), "held": found.split, "seed": options.seed}
        code = labelled_code(subject.tokenizer, options.code, **shape) if options.code else None
        told = evaluation(watch, subject, task, code=code, random=found.random, seed=options.seed)
        write_record(options.evaluate, told)
        print(report(told))
    if texts is not None:
        records = watched(watch, subject.model, subject.tokenizer, texts)
        show(records, watch, colour=options.colour, page=options.html)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(monitor, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
