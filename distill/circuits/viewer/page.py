"""One HTML file with everything in it: the payload, a template, the graph library and the scripts beside this file.

A page runs no text. The payload stands in a block of JSON in which no `<`, `>` or `&` is left, the scripts put it into
the page as text nodes only, and a content security policy allows these scripts by their hashes and nothing else: no
request can leave the page, and no other script can run in it, whatever a token or a label says.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from distill.artifact import versions, write_text
from distill.circuits.viewer.payload import FORMAT
from distill.circuits.viewer.settings import MEGABYTE, ViewConfig

EDGES_SHOWN = 6000
"""Edges above which circuits are drawn by head and layer."""
TARGET = 0.15
"""Target loss, in nats, of the circuit of a curve that is shown first."""
SCRIPTS = ("data", "state", "layout", "draw", "tokens", "node-panel", "panels", "controls", "export", "main")
"""In the order that they need each other; together they are one script."""
LIBRARY = "cytoscape.min.js"


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page, ready to be written to a file or shown in a notebook."""

    payload: Mapping[str, Any]
    """What it shows; see README.md beside this file."""
    html: str
    """The whole page."""

    def save(self, path: str | Path) -> Path:
        """Writes the page, whole or not at all; returns the path."""
        write_text(path, self.html)
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        framed = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{framed}" style="width:100%;height:760px;border:1px solid #ddd"></iframe>'


def render(
    views: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    links: Sequence[Mapping[str, Any]] = (),
    config: ViewConfig | None = None,
) -> Page:
    """The page of some circuits, each as `view` gives it.

    Arguments:
        views: the first is shown, or with `links` the first two side by side.
        title: stands at the top; by default the first circuit's name.
        links: correspondences between two of the circuits: `left` and `right` (their numbers), `kind` (words), `pairs`
            ([place of a node on the left, one on the right, strength in -1 to 1]).
        config: how large the page may become.

    ValueError for no views, and where the page is too large though no examples are left.
    """
    if not views:
        raise ValueError("views: got none; allowed are one or more")
    config = config or ViewConfig()
    whole = {
        "format": FORMAT,
        "title": title or str(views[0]["name"]),
        "circuits": [dict(one) for one in views],
        "links": [dict(one) for one in links],
        "notes": [],
        "limits": {"edges_shown": EDGES_SHOWN, "target": TARGET},
        "versions": versions(),
    }
    room = int(config.megabytes * MEGABYTE) - len(_asset(LIBRARY)) - sum(len(_asset(f"{name}.js")) for name in SCRIPTS)
    payload = shrunk(whole, room)
    return Page(payload=payload, html=_page(payload))


def escaped(value: Any) -> str:
    """JSON that can stand in a script block: no character in it can end the block or begin a tag."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shrunk(payload: dict[str, Any], room: int) -> dict[str, Any]:
    """The payload in at most `room` bytes: the nodes of least effect lose examples and activations on pairs first.

    How many did is among the `notes`. ValueError where that does not do.
    """
    excess = len(escaped(payload)) - room
    if excess <= 0:
        return payload
    dropped: dict[int, set[int]] = {}
    count = 0
    for _, number, place in _by_effect(payload["circuits"]):
        view = payload["circuits"][number]
        node = view["nodes"][place]
        saved = len(escaped([node["examples"], node["pairs"]]))
        saved += sum(len(escaped(_pairs_at(point, place))) for point in view["points"])
        dropped.setdefault(number, set()).add(place)
        count += 1
        excess -= saved - 30
        # What the note itself takes, and the rounding of these sums.
        if excess < -300:
            break
    circuits = [_lighter(view, dropped.get(number, set())) for number, view in enumerate(payload["circuits"])]
    note = f"to keep the page small, examples of the {count:,} nodes with the least effect were left out"
    found = {**payload, "circuits": circuits, "notes": [*payload["notes"], note]}
    if len(escaped(found)) > room:
        raise ValueError(
            f"megabytes: the page would need {len(escaped(found)) / MEGABYTE:.1f} without any examples; allowed are a "
            "larger page, fewer circuits, or a smaller number of edges"
        )
    return found


def _by_effect(views: Sequence[Mapping[str, Any]]) -> list[tuple[float, int, int]]:
    """Every node as (largest effect in any circuit of its view, number of the view, place), the least first."""
    found: list[tuple[float, int, int]] = []
    for number, view in enumerate(views):
        most = [0.0] * len(view["nodes"])
        for point in view["points"]:
            for place, effect in zip(point["nodes"], point["effect"], strict=True):
                most[place] = max(most[place], abs(effect))
        found += [(effect, number, place) for place, effect in enumerate(most)]
    return sorted(found)


def _pairs_at(point: Mapping[str, Any], place: int) -> Any:
    return point["pairs"][point["nodes"].index(place)] if place in point["nodes"] else None


def _lighter(view: Mapping[str, Any], dropped: set[int]) -> dict[str, Any]:
    nodes = [
        {**node, "examples": None, "pairs": None} if place in dropped else node
        for place, node in enumerate(view["nodes"])
    ]
    points = [
        {
            **point,
            "pairs": [
                None if place in dropped else rows for place, rows in zip(point["nodes"], point["pairs"], strict=True)
            ],
        }
        for point in view["points"]
    ]
    return {**view, "nodes": nodes, "points": points}


def _page(payload: Mapping[str, Any]) -> str:
    script = '(() => {\n"use strict";\n' + "\n".join(_asset(f"{name}.js") for name in SCRIPTS) + "\n})();\n"
    library = _asset(LIBRARY)
    hashes = " ".join(f"'sha256-{_digest(one)}'" for one in (library, script))
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=html.escape(str(payload["title"])),
        style=_asset("page.css"),
        payload=escaped(payload),
        library=library,
        script=script,
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (resources.files("distill.circuits.viewer") / "assets" / name).read_text(encoding="utf-8")
