"""A watch with all that its report needs: over a circuit's own model, or over the dense model behind a bridge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bridges.lineup import NO_BRIDGE, load_pair
from bridges.training_split import dense_split
from bridges.watch import random_shadows, shadow_watch
from distill.circuits.circuit import Circuit
from distill.circuits.detection import random_watches
from distill.circuits.origin import find_subject
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task
from distill.circuits.training_split import TrainingSplit, model_places, training_split
from distill.circuits.watch import Watch, make_watch


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A model that is watched."""

    subject: Subject
    """The model that runs."""
    watch: Watch
    """Calibrated."""
    split: TrainingSplit | None
    """Which files the model's training held out; None where nothing says."""
    random: Callable[[int], Sequence[Watch]]
    """Watches like it over random nodes, by their number."""


def load_watched(
    circuit: Circuit,
    file: Path,
    task: Task,
    *,
    bridge: str = NO_BRIDGE,
    models: Sequence[str] = (),
    corpus: Sequence[str] = (),
    device: str = "cpu",
    fpr: float = 0.05,
    signal: str = "strength",
    seed: int = 0,
) -> Watched:
    """Loads the model of a circuit, or with a bridge the dense model of its student, and calibrates a watch over it.

    Arguments as for `find_subject`, `load_pair` and `make_watch`; ValueError as these.
    """
    options = {"fpr": fpr, "signal": signal, "seed": seed}
    if bridge == NO_BRIDGE:
        subject = find_subject(circuit, file, models=models, corpus=corpus, device=device)
        split = training_split(subject, model_places(circuit, file, models))
        watch = make_watch(subject, circuit, task, **options)
        random = partial(random_watches, subject, circuit, task, watch)
    else:
        subject, student, bridges = load_pair(bridge, corpus=corpus, device=device)
        split = dense_split(subject, bridge)
        watch = shadow_watch(subject, student, bridges, circuit, task, **options)
        random = partial(random_shadows, subject, student, bridges, circuit, task, watch)
    return Watched(subject=subject, watch=watch, split=split, random=lambda count: random(count=count, seed=seed))
