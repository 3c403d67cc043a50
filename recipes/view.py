"""Look at circuits: one HTML page that opens from disk, needs no network, and holds everything.

    python recipes/view.py runs/circuits/single_double_quote.sparse.circuit.safetensors
    python recipes/view.py runs/sweep                        # all circuits of a folder; a curve gets a slider
    python recipes/view.py DENSE_CIRCUIT STUDENT_CIRCUIT --bridge student

Writes {name}.html beside the first circuit. Circuits of one model and task with different targets become one graph with
a slider over the targets. With --bridge a circuit of a dense model and one of its student stand side by side, linked by
what the bridge says. A scorecard ({name}.scorecard.json, by recipes/check_circuit.py) and your own labels
({name}.labels.json, saved from the page) are taken from beside the circuit. Expect a few seconds a circuit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from bridges.page import ENDING, circuit_files, circuit_page
from distill import command
from distill.circuits.circuit import SUFFIX
from distill.circuits.viewer import ViewConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of view."""

    circuit: tyro.conf.Positional[tuple[Path, ...]]
    """Files of circuits (*.circuit.safetensors), or folders with some."""
    bridge: str | None = None
    """Folder of a student with bridges, or a shipped one's short name, to link a dense circuit with the student's."""
    model: tuple[str, ...] = ()
    """Models of the circuits: folders or short names; none: found by what the files and the folders around them say."""
    task: str | None = None
    """Task by name, or a JSONL file of pairs; none: the built-in one that the circuit names."""
    corpus: tuple[str, ...] = ()
    """Text to look for examples in, for models that bring none (see train_sparse)."""
    config: ViewConfig = field(default_factory=ViewConfig)
    """How much the page shows."""
    out: Path | None = None
    """File of the page; none: {name}.html beside the first circuit."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def view(options: Options) -> None:
    """Find what belongs to the circuits, compute the page, write it."""
    files = circuit_files(options.circuit)
    page = circuit_page(
        files,
        models=options.model,
        task=options.task,
        bridge=options.bridge,
        corpus=options.corpus,
        device=options.device,
        config=options.config,
    )
    out = options.out or files[0].with_name(files[0].name.removesuffix(SUFFIX) + ENDING)
    page.save(out)
    for one in page.payload["circuits"]:
        point = one["points"][-1]
        print(f"{one['name']}: {len(one['nodes'])} nodes, {len(one['edges']['weight'])} edges, {point['effect_kind']}")
    print(f"{len(page.html) / 2**20:.1f} MB in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(view, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
