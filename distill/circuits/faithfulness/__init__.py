"""Is a circuit what the model does, or an artefact of pruning? One file per check, each a pure function.

Every check returns a `Check`: a value, the same value for controls where there are any, the threshold, and what
follows from them.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check of faithfulness."""

    name: str
    """Name of the check."""
    value: float
    """The number that the check is about; its unit is in the check's docstring."""
    control: tuple[float, ...] = ()
    """The same number for each control (random node sets, say)."""
    threshold: float
    """What the value, or the ratio that the check names, is held against."""
    verdict: Literal["pass", "flag"]
    """Whether the check flags the circuit."""
    reason: str
    """The verdict in words, with the numbers it rests on."""
    n: int
    """Number of prompts."""
    seed: int | None = None
    """Seed of the controls; None where nothing is drawn."""
    details: dict[str, float] = field(default_factory=dict)
    """Further numbers, by name."""
