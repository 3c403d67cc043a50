"""Edit a model at the nodes of a circuit, in its weights, and account for everything that changes.

    python recipes/edit_circuit.py --circuit runs/circuits/single_double_quote.sparse.circuit.safetensors \\
        --edit.op scale --edit.factor -0.6 --edit.away closing_quotes
    python recipes/edit_circuit.py --circuit FILE --edit.op ablate --edit.nodes 2.mlp.act_in.145 0.mlp.post_act.124
    python recipes/edit_circuit.py --circuit STUDENTS_CIRCUIT --bridge student --edit.directions contrast \\
        --op scale --factor -1.5                                         # the dense model behind the student's bridges

The short forms --op, --nodes, --factor and --value go before those of --edit. The edited model is an ordinary Hugging
Face folder (a dense one loads by transformers alone) with account.json beside it: the task, held-out text and every
other task, before and after, and the same for random edits of the same size. What weights cannot stand for exactly is
refused in words, unless --edit.inexact. Expect two minutes on two cores for the shipped models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bridges.contrast import contrast_maker
from bridges.editing import bridged_maker
from bridges.lineup import NO_BRIDGE, load_pair
from bridges.training_split import dense_split
from distill import command
from distill.artifact import default_out
from distill.circuits import Circuit
from distill.circuits.edit_run import EditConfig, check_out, own_maker, run_edit, save_edit
from distill.circuits.origin import find_subject, find_task
from distill.circuits.training_split import model_places, training_split


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of edit_circuit."""

    circuit: Path
    """File of a circuit (*.circuit.safetensors)."""
    op: str | None = None
    """ablate, scale, clamp, cut-edges; over a bridge also add, but no cut-edges."""
    nodes: tuple[str, ...] = ()
    """Names of nodes (or edges, SOURCE->TARGET), or auto."""
    factor: float | None = None
    """For scale: what is left of a node's deviation from its mean."""
    value: float | None = None
    """For clamp and add: in units of the activation."""
    bridge: str = NO_BRIDGE
    """Student with bridges whose dense model is to be edited: folder of fit_bridges, or a shipped one's short name;
    none: the circuit's own model is."""
    edit: EditConfig = field(default_factory=EditConfig)
    """What to change, and on what it is judged."""
    model: tuple[str, ...] = ()
    """Model of the circuit: folder or short name; none: found by what the file and the folder around it say."""
    task: str | None = None
    """Task by name, or a JSONL file of pairs; none: the built-in one that the circuit names."""
    corpus: tuple[str, ...] = ()
    """Text to measure on, for models that bring none (see train_sparse)."""
    out: Path = default_out("edited")
    """Folder for the edited model; an earlier edited one there is replaced, and nothing else is."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def edit_circuit(options: Options) -> None:
    """Load, edit, account, save, print."""
    check_out(options.out)
    if options.model and options.bridge != NO_BRIDGE:
        raise ValueError("model: the models are those of --bridge; allowed is one of the two")
    given = {name: getattr(options, name) for name in ("op", "nodes", "factor", "value")}
    config = replace(options.edit, **{name: value for name, value in given.items() if value not in (None, ())})
    circuit = Circuit.load(options.circuit)
    task = find_task(circuit, options.task)
    if options.bridge == NO_BRIDGE:
        found = {"models": options.model, "corpus": options.corpus, "device": options.device}
        subject = find_subject(circuit, options.circuit, **found)
        split = training_split(subject, model_places(circuit, options.circuit, options.model))
        maker = own_maker(subject, circuit, config)
    else:
        device = str(command.pick_device(options.device))
        subject, student, bridges = load_pair(options.bridge, corpus=options.corpus, device=device)
        split = dense_split(subject, options.bridge)
        pair = subject, student, bridges, circuit
        contrast = config.directions == "contrast"
        maker = contrast_maker(*pair, task, config) if contrast else bridged_maker(*pair, config)
    check_out(options.out, subject)
    model, account = run_edit(subject, task, config, maker, split)
    print(f"{config.op} {' '.join(account.edit.names)} in {subject.name}\n\n{account.table()}\n")
    origin = {"circuit": options.circuit, "bridge": options.bridge}
    save_edit(options.out, subject, model, account, config, origin, split)
    print(f"edited model and account.json in {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(edit_circuit, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
