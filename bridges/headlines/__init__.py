"""Published results, rerun: each with what the source found, a rule for when it holds here, and what came out.

The rules stand before the numbers are known; `holds` is None where nothing could be measured.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bridges.headlines.baselines import BASELINES
from bridges.headlines.bridge import BRIDGE
from bridges.headlines.circuits import CIRCUITS
from bridges.headlines.models import MODELS
from bridges.headlines.setting import Found, Headline, Setting, family_names
from distill.artifact import write_record

HEADLINES: Mapping[str, Headline] = {one.name: one for one in (*CIRCUITS, *BASELINES, *MODELS, *BRIDGE)}
"""All of them, by name."""

__all__ = ["HEADLINES", "Found", "Headline", "Setting", "command_line", "family_names", "save", "table"]


def save(name: str, found: Found, folder: Path, more: Mapping[str, Any]) -> None:
    """Writes {name}.json, and {name}.png where there is a plot, into an existing folder."""
    one = HEADLINES[name]
    stated = {"name": name, "source": one.source, "claim": one.claim, "rule": one.rule}
    took = {"seconds_searching": round(found.searching, 1)}
    write_record(
        folder / f"{name}.json",
        {**stated, "ours": found.ours, "holds": found.holds, **more, **took, "numbers": found.record},
    )
    if found.figure is not None:
        found.figure.savefig(folder / f"{name}.png", dpi=110)


def table(outcomes: Mapping[str, tuple[Found, float]], commands: Mapping[str, str]) -> str:
    """Outcomes with their seconds and commands as a table of Markdown.

    Seconds are those of this run and, in brackets, those that the circuits took when they were searched for: a circuit
    is shared by all results that it belongs to.
    """
    lines = ["| result | source | ours | holds | seconds (circuits) | command |", "|---|---|---|---|---:|---|"]
    return "\n".join([*lines, *_rows(outcomes, commands)])


def _rows(outcomes: Mapping[str, tuple[Found, float]], commands: Mapping[str, str]) -> Iterator[str]:
    said = {True: "yes", False: "no", None: "not measured"}
    for name, (found, seconds) in outcomes.items():
        one = HEADLINES[name]
        took = f"{seconds:.0f}" + (f" ({found.searching:.0f})" if found.searching else "")
        yield (
            f"| {name} {one.source} | {one.claim} | {found.ours} | {said[found.holds]} | {took} | `{commands[name]}` |"
        )


def command_line(program: str, options: Any, usual: Any) -> str:
    """The command that gives a dataclass of options its values: those that differ from the usual ones."""
    return " ".join([program, *_flags(options, usual, "--")])


def _flags(options: Any, usual: Any, prefix: str) -> Iterator[str]:
    for one in fields(options):
        value, known, flag = getattr(options, one.name), getattr(usual, one.name), prefix + one.name.replace("_", "-")
        if value == known:
            continue
        if is_dataclass(value):
            yield from _flags(value, known, f"{flag}.")
        elif isinstance(value, bool):
            yield flag if value else f"{prefix}no-{one.name.replace('_', '-')}"
        else:
            values = value if isinstance(value, tuple) else (value,)
            yield " ".join([flag, *(shlex.quote(str(part)) for part in values)])
