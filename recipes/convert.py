"""Models and circuits from and to other people's formats.

    python recipes/convert.py from-openai csp_yolo1 --tokenizer tinypython --out runs/yolo1
    python recipes/convert.py to-openai runs/yolo1 --out runs/yolo1_back
    python recipes/convert.py export-viz FILE.circuit.safetensors --out runs/openai
    python recipes/convert.py import-viz viz_data.pt --model runs/yolo1 --corpus stdlib --task class_init --out FILE
    python recipes/convert.py export FILE.circuit.safetensors --out circuit.graphml

export goes by the ending of --out: .graphml .csv .mib.json .json; formats: distill/formats/README.md. Takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from distill import command, load_model, load_subject
from distill.circuits import Circuit, export
from distill.circuits.circuit import SUFFIX
from distill.circuits.origin import find_subject, find_task
from distill.formats import VizSettings, export_viz, import_checkpoint, import_viz, write_openai

USES = {
    "from-openai": {"tokenizer", "overwrite"},
    "to-openai": {"nearest", "overwrite"},
    "export-viz": {"model", "task", "corpus", "viz", "device", "overwrite"},
    "import-viz": {"model", "task", "target", "corpus", "device", "overwrite"},
    "export": {"model", "overwrite"},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of convert."""

    action: tyro.conf.Positional[Literal["from-openai", "to-openai", "export-viz", "import-viz", "export"]]
    """What to do."""
    source: tyro.conf.Positional[Path]
    """What to convert: a folder of OpenAI's, a model (also by short name), a circuit file, or a viewer's payload."""
    out: Path
    """Folder or file to write."""
    tokenizer: Path | None = None
    """from-openai: folder with encoder.json and vocab.bpe; none: the source, where it has them."""
    nearest: bool = False
    """to-openai: write a model whose norms have another eps than theirs nevertheless; what that changes is printed."""
    model: str | None = None
    """The circuit's model: folder or short name; none: found by what the circuit's file says."""
    task: str | None = None
    """The circuit's task: name or JSONL file; none: the built-in one that the circuit names."""
    target: float = 0.15
    """import-viz: task loss that the circuit was pruned to, in nats."""
    corpus: tuple[str, ...] = ()
    """Text to measure ablation values on, for models that bring none (see train_sparse)."""
    viz: VizSettings = field(default_factory=VizSettings)
    """export-viz: what the payload is measured on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    overwrite: bool = False
    """Replace what is there."""


def convert(options: Options) -> None:
    """Check that every option given is of use, convert, print."""
    asked = {name for name, value in vars(options).items() if value != getattr(Options, name, VizSettings())}
    for name in asked - USES[options.action] - {"action", "source", "out"}:
        raise ValueError(f"{name}: of no use with {options.action}; allowed are {sorted(USES[options.action])}")
    source, out, name = options.source, options.out, f"recipes/convert.py {options.action}"
    made = {"command": name, "overwrite": options.overwrite}
    if out.is_file() and not options.overwrite:
        raise ValueError(f"out: {out} exists already; allowed are another name or --overwrite")
    if options.action == "from-openai":
        print(import_checkpoint(source, out, tokenizer=options.tokenizer, **made).lines())
    elif options.action == "to-openai":
        print(write_openai(source, out, nearest=options.nearest, **made).lines())
    elif options.action == "import-viz":
        if options.model is None or options.task is None or not out.name.endswith(SUFFIX):
            raise ValueError(f"model, task, out: import-viz needs all three; out ends in {SUFFIX}")
        subject = load_subject(options.model, corpus=options.corpus, device=options.device)
        circuit = import_viz(source, subject, task=options.task, target=options.target, command=name)
        print(f"{circuit.n_nodes} nodes in {circuit.save(out)}")
    elif options.action == "export":
        circuit = Circuit.load(source)
        model = load_model(options.model) if options.model else find_subject(circuit, source).model
        print(f"{circuit.n_nodes} nodes in {export(circuit, model, out)}")
    else:
        circuit, where = Circuit.load(source), [options.model] if options.model else []
        subject = find_subject(circuit, source, models=where, corpus=options.corpus, device=options.device)
        print(export_viz(circuit, subject, find_task(circuit, options.task), out, options.viz, **made))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(convert, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
