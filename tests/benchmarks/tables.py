"""Markdown tables of what `bench_all` measured.

python tests/benchmarks/tables.py results.json
"""

import sys
from pathlib import Path
from typing import Any

from distill.artifact import read_json

HEAD = "| what | plain | fast | ratio | least to largest | asked |\n|---|---:|---:|---:|---|---:|"


def seconds(value: float) -> str:
    """As milliseconds or seconds, three digits."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def line(row: dict[str, Any]) -> str:
    """One comparison."""
    low, high = row["spread"]
    asked = "" if row["least"] is None else f"{row['least']:g}x"
    return (
        f"| {row['name']} | {seconds(row['reference'])} | {seconds(row['fast'])} | **{row['ratio']:.1f}x** "
        f"| {low:.1f} to {high:.1f} | {asked} |"
    )


def other(row: dict[str, Any]) -> str:
    """A row that is no comparison: its numbers by name."""
    values = (f"{name.replace('_', ' ')} {value:.3g}" for name, value in row.items() if name != "what")
    return f"- {row['what']}: {', '.join(values)}"


def tables(results: dict[str, Any]) -> str:
    """The machine, and a section for every part."""
    here = results["machine"]
    found = [f"{here['processor']}, {here['threads']} threads, {here['instructions']}, load {here['load']:.1f}"]
    for name, rows in results["results"].items():
        compared = [line(row) for row in rows if "ratio" in row]
        found += [f"\n### {name}\n", *([HEAD, *compared] if compared else [])]
        found += [other(row) for row in rows if "ratio" not in row]
    return "\n".join(found)


if __name__ == "__main__":
    print(tables(read_json(Path(sys.argv[1]), what="results")))
