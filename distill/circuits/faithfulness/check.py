"""What every check of faithfulness returns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

Verdict = Literal["pass", "flag", "artefact", "skipped"]
"""Held; held against the circuit; says that it is an artefact of pruning; could not be asked."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check of faithfulness."""

    name: str
    """Name of the check."""
    value: float
    """The number that the check is about; its unit is in the check's docstring. NaN where the check was skipped."""
    control: tuple[float, ...] = ()
    """The same number for each control (random node sets, say)."""
    threshold: float
    """What the value, or the ratio that the check names, is held against."""
    verdict: Verdict
    """Whether the check flags the circuit."""
    reason: str
    """The verdict in words, with the numbers it rests on."""
    n: int
    """Number of prompts."""
    seed: int | None = None
    """Seed of what is drawn; None where nothing is."""
    p: float | None = None
    """Chance of a value as good as this one if the circuit were no better than its controls; None where not tested."""
    details: dict[str, float] = field(default_factory=dict)
    """Further numbers, by name."""

    def __post_init__(self) -> None:
        # Every comparison with NaN is false, so that it would pass what it was never held against.
        if math.isnan(self.value) and self.verdict != "skipped":
            raise ValueError(f"value: got nan in check {self.name!r}; allowed is that where the verdict is skipped")

    @property
    def flagged(self) -> bool:
        """Whether the check speaks against the circuit."""
        return self.verdict in ("flag", "artefact")

    @property
    def chances(self) -> dict[str, float]:
        """Every p of the check, by what was tested: its own, and those in the details (`p_specific`)."""
        own = {} if self.p is None else {self.name: self.p}
        more = {f"{self.name}, {name[2:]}": p for name, p in self.details.items() if name.startswith("p_")}
        return own | more

    @property
    def typical_control(self) -> float | None:
        """Median of the controls; None where there are none."""
        return median(self.control) if self.control else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `control` is the median of `controls`, and what is no finite number is null."""
        return {
            "name": self.name,
            "value": finite(self.value),
            "control": finite(self.typical_control),
            "threshold": finite(self.threshold),
            "verdict": self.verdict,
            "n": self.n,
            "seed": self.seed,
            "p": self.p,
            "reason": self.reason,
            "controls": [finite(value) for value in self.control],
            "details": {name: finite(value) for name, value in self.details.items()},
        }


def skipped(name: str, reason: str, *, n: int = 0) -> Check:
    """The record of a check that could not be asked, and why."""
    return Check(name=name, value=math.nan, threshold=math.nan, verdict="skipped", reason=reason, n=n)


def finite(value: float | None) -> float | None:
    """The value, or None for NaN and infinities, which JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else value


def said(value: float) -> str:
    """A number for people: three digits, and 0 for what is nearly so."""
    return "0" if abs(value) < 1e-6 else f"{value:.3g}"


def verdict_of(complaints: Sequence[str], praise: str) -> tuple[Literal["pass", "flag"], str]:
    """("flag", the complaints) where there are any, else ("pass", the praise)."""
    return ("flag", "; ".join(complaints)) if complaints else ("pass", praise)
