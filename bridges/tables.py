"""What a student and its bridges are worth, as tables for people, out of `bridge_metrics`."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    ("nmse_d2s", "NMSE d>s"),
    ("nmse_s2d", "NMSE s>d"),
    ("kl_d2s", "KL d>s"),
    ("kl_s2d", "KL s>d"),
    ("hybrid_ce_d2s", "loss d>s"),
    ("hybrid_ce_s2d", "loss s>d"),
    ("recovered_d2s", "recovered d>s"),
    ("recovered_s2d", "recovered s>d"),
)
"""Values by site, and what heads their column: d>s from the dense model into the sparse one, s>d back."""


def site_mean(sites: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """Mean over sites; a site whose stream does not vary has no NMSE, and where all are so there is no mean."""
    values = [site[name] for site in sites.values() if site.get(name) is not None]
    return sum(values) / len(values) if values else None


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Two tables in Markdown: of the fitted bridges by site, and their means over sites beside the baselines.

    `metrics` as in bridges.json. NMSE at position 0 stands in brackets.
    """
    by_site = []
    for site, values in metrics["sites"].items():
        cells = [_cell(values[name]) for name, _ in COLUMNS]
        for place, name in enumerate(("nmse_d2s_first", "nmse_s2d_first")):
            cells[place] += f" ({_cell(values[name])})"
        by_site.append([site, _cell(values["floor"]), *cells])
    rows = {"fitted": metrics, **metrics["baselines"]}
    means = [
        [name, _cell(one["student_ce"]), *(_cell(site_mean(one["sites"], key)) for key, _ in COLUMNS)]
        for name, one in rows.items()
    ]
    heads = [head for _, head in COLUMNS]
    losses = [one["ce"] for one in metrics["mixtures"]]
    parts = [_table(["site", "floor", *heads], by_site), _table(["means over sites", "sparse model", *heads], means)]
    parts.append(
        f"Losses in nats per token over {metrics['tokens']:,} held-out tokens: dense {_cell(metrics['dense_ce'])}, "
        f"student {_cell(metrics['student_ce'])}, bigram {_cell(metrics['bigram_ce'])}"
        + (f"; {len(losses)} random mixtures {min(losses):.3f} to {max(losses):.3f}" if losses else "")
    )
    return "\n\n".join([*parts, *(f"Warning: {warning}" for warning in metrics.get("warnings", []))])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
