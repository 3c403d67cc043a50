"""What a rerun of a published result works on, and what it comes to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bridges.compare import CompareConfig, Comparison, compare
from bridges.lineup import load_pair
from bridges.maps import Bridges
from bridges.ratios import arm_of
from distill.artifact import fingerprint
from distill.circuits.circuit import SUFFIX, Circuit
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task

OUT_OF_REACH = 1e-9
"""A target in nats that no model meets, so that every task gets the relative one (METHODS 6.7)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Models, tasks and settings that the results are rerun on."""

    sparse: tuple[Subject, ...]
    """Sparse model, or several seeds of it: `sparse`, `sparse_2`, ..."""
    dense: tuple[Subject, ...]
    """Dense counterpart of matched held-out loss, likewise."""
    family: tuple[Subject, ...] = ()
    """Further models, of other widths and densities."""
    bridge: str = ""
    """Folder or short name of a student with bridges."""
    tasks: tuple[Task, ...]
    """Tasks that circuits are compared on."""
    config: CompareConfig = field(default_factory=CompareConfig)
    """How circuits are searched for and judged."""
    circuits: Path
    """Folder that keeps every circuit as soon as it is found: each is searched for once, by whatever result, in this
    run or an earlier one."""
    device: str = "cpu"
    """Where the models are."""

    @property
    def pair(self) -> list[Subject]:
        """Sparse and dense models."""
        return [*self.sparse, *self.dense]

    @property
    def every(self) -> list[Subject]:
        """All models but those of the bridge."""
        return [*self.pair, *self.family]

    @cached_property
    def bridged(self) -> tuple[Subject, Subject, Bridges]:
        """The dense model, its student, and the bridges."""
        return load_pair(self.bridge, device=self.device)

    @cached_property
    def shelf(self) -> list[Circuit]:
        """All circuits found so far, of any model, task, objective and target. ArtifactError for a damaged one."""
        return [Circuit.load(path) for path in sorted(self.circuits.rglob(f"*{SUFFIX}"))]

    @cached_property
    def _done(self) -> dict[Any, Comparison]:
        return {}

    def keep(self, circuit: Circuit) -> None:
        """Puts a circuit on the shelf, and into a file named by what it was searched for by."""
        settings = circuit.provenance["config"]
        key = fingerprint(
            {"model": circuit.model, "target": circuit.target, "settings": repr(sorted(settings.items()))}
        )
        self.circuits.mkdir(parents=True, exist_ok=True)
        name = f"{circuit.task}.{circuit.model_name}.{settings['objective']}.{circuit.target:.4g}.{key[:8]}{SUFFIX}"
        circuit.save(self.circuits / name)
        self.shelf.append(circuit)

    def compared(self, subjects: Sequence[Subject], config: CompareConfig) -> Comparison:
        """Circuits of some models side by side, searched for where the shelf does not hold them yet."""
        marks = {one.name: one.model.fingerprint() for one in subjects}
        key = (tuple(marks.items()), config)
        if key not in self._done:
            known = {
                (task.name, name): [one for one in self.shelf if (one.task, one.model) == (task.name, mark)]
                for task in self.tasks
                for name, mark in marks.items()
            }
            self._done[key] = compare(subjects, self.tasks, config, known=known, keep=self.keep)
        return self._done[key]

    def sizes(self, objective: str, *, relative: bool = False, subjects: Sequence[Subject] = ()) -> Comparison:
        """The circuits of the pair under an objective, `paper` or `faithful`.

        Args:
            relative: give every task the relative target, not only those on which the one asked for is out of reach.
            subjects: other models than the pair.
        """
        config = replace(self.config, prune=replace(self.config.prune, objective=objective))
        if relative:
            config = replace(config, relative=True, prune=replace(config.prune, target=OUT_OF_REACH))
        return self.compared(subjects or self.pair, config)


def family_names(paths: Sequence[str]) -> dict[str, str]:
    """What further models are called, by name: as their folders, with `other_` before what would read as an arm.

    ValueError for two folders of one name.
    """
    found: dict[str, str] = {}
    for path in paths:
        name = Path(path).name
        name = name if arm_of(name) is None else f"other_{name}"
        if name in found:
            raise ValueError(f"family: {found[name]} and {path} have one name; allowed are folders of different names")
        found[name] = path
    return found


def searching(comparison: Comparison) -> float:
    """Seconds that the circuits took, whenever they were searched for."""
    stages = [one.provenance.get("seconds", {}) for one in comparison.circuits.values()]
    return float(sum(value for stage in stages for value in stage.values()))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rerun came to."""

    ours: str
    """The outcome in a sentence, with its interval or spread."""
    holds: bool | None
    """Whether the source's statement holds here, by the rule of the result; None where nothing could be measured."""
    record: Mapping[str, Any]
    """All numbers, plain JSON values."""
    figure: Figure | None = None
    """Its plot."""
    searching: float = 0.0
    """Seconds that the circuits it stands on took, whenever they were searched for."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A published result, and how it is rerun."""

    name: str
    """What the command line calls it."""
    source: str
    """Figure or section of the source."""
    claim: str
    """What the source found."""
    rule: str
    """When it holds here."""
    rerun: Callable[[Setting], Found]
    """Does it."""
