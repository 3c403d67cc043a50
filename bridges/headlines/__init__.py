"""Published results, rerun: each with what the source found, a rule for when it holds here, and what came out.

The rules stand before the numbers are known; `holds` is None where nothing could be measured.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bridges.headlines.bridge import BRIDGE
from bridges.headlines.circuits import CIRCUITS
from bridges.headlines.models import MODELS
from bridges.headlines.setting import Found, Headline, Setting
from distill.artifact import write_record

HEADLINES: Mapping[str, Headline] = {one.name: one for one in (*CIRCUITS, *MODELS, *BRIDGE)}
"""All of them, by name."""

__all__ = ["HEADLINES", "Found", "Headline", "Setting", "save", "table"]


def save(name: str, found: Found, folder: Path, more: Mapping[str, Any]) -> None:
    """Writes {name}.json, and {name}.png where there is a plot, into an existing folder."""
    one = HEADLINES[name]
    stated = {"name": name, "source": one.source, "claim": one.claim, "rule": one.rule}
    write_record(
        folder / f"{name}.json", {**stated, "ours": found.ours, "holds": found.holds, **more, "numbers": found.record}
    )
    if found.figure is not None:
        found.figure.savefig(folder / f"{name}.png", dpi=110)


def table(outcomes: Mapping[str, tuple[Found, float]]) -> str:
    """Outcomes and their seconds as a table of Markdown."""
    lines = ["| result | source | ours | holds | seconds |", "|---|---|---|---|---:|"]
    return "\n".join([*lines, *_rows(outcomes)])


def _rows(outcomes: Mapping[str, tuple[Found, float]]) -> Iterator[str]:
    said = {True: "yes", False: "no", None: "not measured"}
    for name, (found, seconds) in outcomes.items():
        one = HEADLINES[name]
        yield f"| {name} {one.source} | {one.claim} | {found.ours} | {said[found.holds]} | {seconds:.0f} |"
