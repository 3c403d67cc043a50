"""Steer a dense model by nodes of its sparse student: what the student says moves, does it move the dense model?

    python recipes/steer.py --task while_return_true
    python recipes/steer.py --bridge runs/student --task single_double_quote --node 2.attn.act_in.46 --strength 0:2:9

Each prompt of the task has a counterfactual. The difference that it makes to the chosen nodes of the student, carried
over the bridge, is added to the dense model's reads at the same places. steering.json and steering.png hold the
probability of the counterfactual's answer against the strength, beside random directions of the same length. With
`auto` the nodes are those whose counterfactual values move the student's own answer most, on training prompts; the
outcome is on test prompts. Expect seconds for the shipped pair.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bridges.lineup import load_pair
from bridges.steering import parse_strengths, plot_steering, rank_reads, steer
from distill import command
from distill.artifact import Provenance, check_free, default_out, fresh_folder, write_json
from distill.circuits.tasks import encode, load_task

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of steer."""

    bridge: str = "student"
    """Student with bridges: folder of fit_bridges, or a shipped one's short name."""
    task: tuple[str, ...] = ("while_return_true",)
    """Tasks by name, or JSONL files."""
    node: tuple[str, ...] = (AUTO,)
    """Read nodes of the student, such as 2.attn.act_in.46, steered together; auto: its strongest ones."""
    top: int = 64
    """Nodes with auto."""
    strength: str = "0:1:11"
    """Strengths as FIRST:LAST:NUMBER, evenly spaced; 1 is the whole counterfactual difference."""
    controls: int = 8
    """Sets of random directions."""
    pairs: int = 64
    """Pairs of prompts of the test split."""
    corpus: tuple[str, ...] = ()
    """Text for a student that brings none (see train_sparse)."""
    out: Path = default_out("steering")
    """Folder for the results; an earlier result there is replaced."""
    seed: int = 0
    """Seed of prompts and random directions."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def run(options: Options) -> None:
    """Choose nodes, steer, save, print."""
    check_free(options.out, "report", replace=True)
    strengths = parse_strengths(options.strength)
    for name in ("top", "controls", "pairs"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: got {getattr(options, name)}, allowed are whole numbers from 1")
    if AUTO in options.node and len(options.node) > 1:
        raise ValueError(f"node: got {AUTO} beside names; allowed is one or the other")
    if not options.task:
        raise ValueError("task: got none; allowed are one or more")
    tasks = [load_task(name) for name in options.task]
    device = str(command.pick_device(options.device))
    dense, student, bridges = load_pair(options.bridge, corpus=options.corpus, device=device)
    results = {}
    for task in tasks:
        shape = {"context": student.model.context, "aligned": True}
        train, test = (
            encode(task, student.tokenizer, split, options.pairs, options.seed, **shape).to(device)
            for split in ("train", "test")
        )
        nodes = options.node
        if nodes == (AUTO,):
            nodes = tuple(rank_reads(student.model, train)[: options.top])
        models = (dense.model, student.model, bridges)
        found = steer(*models, test, nodes, strengths, controls=options.controls, seed=options.seed)
        results[task.name] = found
        print(f"{task.name}: {found.line()}")
    provenance = Provenance(
        kind="report", command="recipes/steer.py", config=asdict(options), seed=options.seed, data=None
    )
    with fresh_folder(options.out, provenance, replace=True) as folder:
        write_json(folder / "steering.json", {name: found.to_json() for name, found in results.items()})
        plot_steering(results, folder / "steering.png")
    print(f"in {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(run, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
