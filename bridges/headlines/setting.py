"""What a rerun of a published result works on, and what it comes to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bridges.compare import CompareConfig, Comparison, compare, known_circuits
from bridges.lineup import load_pair
from bridges.maps import Bridges
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task


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
    """Folder that keeps the circuits by result, so that a rerun does not search for them again."""
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

    def compared(self, subjects: list[Subject], name: str, config: CompareConfig) -> Comparison:
        """The circuits of some models, searched for where the folder does not hold them yet."""
        folder = self.circuits / name
        known = known_circuits(folder) if folder.is_dir() else None
        found = compare(subjects, self.tasks, config, known=known)
        folder.mkdir(parents=True, exist_ok=True)
        found.save(folder)
        return found

    def sizes(self, objective: str) -> Comparison:
        """The circuits of the pair under an objective, `paper` or `faithful`."""
        config = replace(self.config, prune=replace(self.config.prune, objective=objective))
        return self.compared(self.pair, objective, config)


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
