"""Rerun the published results on models of your own or the shipped ones: what the source found, and what comes out.

    python recipes/reproduce.py --list
    python recipes/reproduce.py --only kurtosis agreement
    python recipes/reproduce.py --model runs/sparse --dense runs/dense --family runs/wide runs/narrow --out runs/mine

Every result has a rule, stated before, for when it holds. The folder gets {result}.json, {result}.png and results.md;
every circuit is kept in its folder circuits/ as soon as it is found, and searched for once, by whatever result. Expect
an hour on two cores for everything on the shipped models, most of it for circuits of all tasks under two objectives.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bridges import CompareConfig, load_lineup
from bridges.headlines import HEADLINES, Setting, command_line, family_names, save, table
from distill import command, load_subject, load_task
from distill.artifact import Provenance, default_out, write_manifest, write_text
from distill.circuits.tasks import task_names


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of reproduce."""

    list: bool = False
    """Name the results with what the source found, and stop."""
    only: tuple[str, ...] = ()
    """Results to rerun, by name; none: all."""
    model: tuple[str, ...] = ("sparse",)
    """Sparse model, or several seeds of one: folders or short names of shipped ones."""
    dense: tuple[str, ...] = ("dense",)
    """Its dense counterpart of matched held-out loss, or several seeds."""
    family: tuple[str, ...] = ("dense_gpt2",)
    """Further models, of other widths and densities; dense ones are further baselines."""
    bridge: str = "student"
    """Folder or short name of a student with bridges."""
    task: tuple[str, ...] = tuple(task_names())
    """Tasks that circuits are compared on, by name, or JSONL files."""
    target: float = 0.15
    """Task loss to meet, in nats; where a full model is above it, the relative target of the source's."""
    config: CompareConfig = field(default_factory=CompareConfig)
    """Pruning and judging; --target and --seed go before its own."""
    out: Path = default_out("reproduce")
    """Folder of the results; circuits that lie there are taken."""
    seed: int = 0
    """Seed of masks, prompts and controls."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def reproduce(options: Options) -> None:
    """Load the models, rerun, print, save."""
    names = options.only or tuple(HEADLINES)
    if unknown := set(names) - set(HEADLINES):
        raise ValueError(f"only: got {unknown.pop()!r}, allowed are {', '.join(HEADLINES)}")
    if options.list:
        return print("\n".join(f"{one.name:16}{one.source}: {one.claim}\n{'':16}holds where {one.rule}"
                               for one in HEADLINES.values()))  # fmt: skip
    tasks, family = tuple(load_task(name) for name in options.task), family_names(options.family)
    device = str(command.pick_device(options.device))
    lineup = load_lineup(options.model, options.dense, device=device)
    setting = Setting(
        sparse=tuple(lineup.subjects[: len(options.model)]),
        dense=tuple(lineup.subjects[len(options.model) :]),
        family=tuple(load_subject(path, name=name, device=device) for name, path in family.items()),
        bridge=options.bridge,
        tasks=tasks,
        config=replace(options.config, prune=replace(options.config.prune, target=options.target, seed=options.seed)),
        circuits=options.out / "circuits",
        device=device,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes, commands = {}, {}
    for name in names:
        commands[name] = command_line("python recipes/reproduce.py", replace(options, only=(name,)), Options())
        began = time.perf_counter()
        found = HEADLINES[name].rerun(setting)
        outcomes[name] = found, time.perf_counter() - began
        more = {"command": commands[name], "seed": options.seed, "seconds": round(outcomes[name][1], 1)}
        save(name, found, options.out, {"options": asdict(options), **more})
        print(f"{name}: {found.ours}")
    write_text(options.out / "results.md", table(outcomes, commands))
    write_manifest(
        options.out,
        Provenance(kind="report", command="recipes/reproduce.py", config=asdict(options), seed=options.seed, data=None),
    )
    print(f"\n{table(outcomes, commands)}\nin {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(reproduce, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
