"""The page in a real headless Chromium with the network off."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.circuits.viewer import labels_path, read_labels, render

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPENING = 3.0
"""Seconds of the page's main thread that a circuit of 5,000 edges may take to open."""
HOSTILE = "</script><script>window.broken=1</script>"
PLACE_OF = "name => circuitPage.page.circuits[0].nodes.findIndex(node => node.name === name)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    with playwright.sync_playwright() as api:
        started = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Tab:
    """One page opened from disk, with everything that it complained of or asked the network for."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.session = self.context.new_cdp_session(self.page)
        self.session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.page.goto(path.as_uri())
        self.page.wait_for_function("window.circuitPage && circuitPage.ready")

    def seconds(self) -> float:
        """Processor time of the page's main thread."""
        metrics = {one["name"]: one["value"] for one in self.session.send("Performance.getMetrics")["metrics"]}
        return metrics["TaskDuration"]

    def visible(self) -> dict[str, Any]:
        return self.page.evaluate("circuitPage.visibleGraph()")

    def click_on(self, name: str) -> None:
        """A real click of the mouse at a node's place on the screen."""
        place = self.page.evaluate(PLACE_OF, name)
        x, y = self.page.evaluate(
            """place => {
                const at = circuitPage.graph.getElementById(`0:${place}`).renderedPosition();
                const box = document.getElementById('graph').getBoundingClientRect();
                return [box.x + at.x, box.y + at.y];
            }""",
            place,
        )
        self.page.mouse.click(x, y)

    def text(self) -> str:
        return self.page.inner_text("#body")


@pytest.fixture
def tab(browser: Any, one_view: dict[str, Any], pages: Path) -> Iterator[Tab]:
    opened = Tab(browser, render([one_view]).save(pages / "one.html"))
    yield opened
    opened.context.close()


def test_it_opens_from_disk_in_silence(tab: Tab, one_view: dict[str, Any], pages: Path) -> None:
    assert tab.said == []
    assert [url for url in tab.asked if not url.startswith(("data:", "blob:"))] == [(pages / "one.html").as_uri()]
    shown = tab.visible()
    point = one_view["points"][1]
    assert len(shown["nodes"]) == len(point["nodes"])
    assert len(shown["edges"]) == len(point["edges"])
    assert shown["circuits"] == [{"name": one_view["name"], "target": 0.15}]


def test_the_graph_is_columns_by_layer_and_rows_by_location(tab: Tab) -> None:
    places = {node["name"]: node for node in tab.visible()["nodes"]}
    kinds = ["attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta", "mlp.act_in", "mlp.post_act"]
    heights = [[node["y"] for name, node in places.items() if f".{kind}." in name] for kind in kinds]
    assert all(max(above) < min(below) for above, below in zip(heights, heights[1:], strict=False))
    left, right = ([node["x"] for name, node in places.items() if name[0] == layer] for layer in "01")
    assert max(left) < min(right)
    spots = [(node["x"], node["y"]) for node in places.values()]
    assert len(set(spots)) == len(spots)


def test_a_click_on_a_node_fills_the_panel(tab: Tab, one_view: dict[str, Any]) -> None:
    edges, point = one_view["edges"], one_view["points"][1]
    joined = {(edges["source"][i], edges["target"][i]) for i in point["edges"]}
    place = next(i for i in point["nodes"] if one_view["nodes"][i]["kind"] == "mlp.post_act" and
                 {end for _, end in joined} & {i} and {start for start, _ in joined} & {i})  # fmt: skip
    name = one_view["nodes"][place]["name"]
    tab.click_on(name)
    text = tab.text()
    assert text.startswith(name)
    into = [one_view["nodes"][s]["name"] for s, t in joined if t == place]
    out = [one_view["nodes"][t]["name"] for s, t in joined if s == place]
    assert f"in ({len(into)})" in text and f"out ({len(out)})" in text
    assert all(other in text for other in [*into, *out])
    for words in ("loss when left out", "circuit against model", "computed from examples", "On the task's pairs"):
        assert words in text
    # A neighbour's name leads on to it.
    tab.page.click(f"#body button.node:has-text('{into[0]}')")
    assert tab.text().startswith(into[0])


def test_a_head_shows_its_attention(tab: Tab, one_view: dict[str, Any]) -> None:
    node = next(node for node in one_view["nodes"] if node["kind"] == "attn.q")
    tab.click_on(node["name"])
    assert f"Attention of head {node['head']}, layer {node['layer']}" in tab.text()
    assert tab.page.locator("#body canvas.pattern").count() == 2


def test_text_is_coloured_by_how_strongly_the_circuit_is_at_work(tab: Tab, one_view: dict[str, Any]) -> None:
    tab.page.click("#tab-text")
    rows = one_view["at_work"]["rows"]
    lines = tab.page.locator("#body .text")
    assert lines.count() == len(rows)
    assert lines.first.locator("span").count() == len(rows[0]["strength"])
    marked = sum(value > one_view["at_work"]["threshold"] for row in rows for value in row["strength"])
    assert tab.page.locator("#body .text span.flag").count() == marked > 0


def test_the_slider_changes_the_number_of_edges(tab: Tab) -> None:
    before = len(tab.visible()["edges"])
    tab.page.fill("#threshold", "0.5")
    after = tab.visible()["edges"]
    assert len(after) == round(before / 4)
    assert tab.page.inner_text("#edges") == f"{len(after):,} of {before:,}"
    hidden = tab.page.evaluate("circuitPage.graph.edges('.weight.hidden').map(edge => edge.data('join').weight)")
    assert max(map(abs, hidden)) <= min(abs(edge["weight"]) for edge in after)


def test_the_target_slider_walks_along_the_curve(tab: Tab, one_view: dict[str, Any]) -> None:
    assert len(tab.visible()["nodes"]) == len(one_view["points"][1]["nodes"])
    tab.page.focus("input.target")
    tab.page.keyboard.press("ArrowLeft")
    shown = tab.visible()
    assert shown["circuits"][0]["target"] == 0.5
    assert len(shown["nodes"]) == len(one_view["points"][0]["nodes"])
    assert len(shown["edges"]) == len(one_view["points"][0]["edges"])


def test_search_and_grouping(tab: Tab, one_view: dict[str, Any]) -> None:
    tab.page.fill("#search", "1.attn.q")
    wanted = [i for i in one_view["points"][1]["nodes"] if one_view["nodes"][i]["name"].startswith("1.attn.q")]
    assert tab.page.inner_text("#found") == f"{len(wanted)} found"
    assert tab.page.evaluate("circuitPage.graph.nodes('.found').length") == len(wanted)
    tab.page.check("#toggle-grouped")
    shown = tab.visible()
    assert sum(node["nodes"] for node in shown["nodes"]) == len(one_view["points"][1]["nodes"])
    assert sum(edge["count"] for edge in shown["edges"]) == len(one_view["points"][1]["edges"])
    assert "drawn by head and layer" in tab.page.inner_text("#notes")


def test_hostile_tokens_and_labels_are_text(tab: Tab, one_view: dict[str, Any]) -> None:
    for name in ("circuit", "scorecard", "made"):
        tab.page.click(f"#tab-{name}")
        assert tab.text()
    tab.page.click("#tab-scorecard")
    assert f"suspicious because {HOSTILE}" in tab.text()
    tab.page.click("#tab-node")
    hostile = one_view["tokens"].index(HOSTILE)
    shows = [
        node
        for node in one_view["nodes"]
        if any(hostile in one_view["windows"][one["window"]][one["start"] : one["stop"]] for one in node["examples"])
    ]
    assert shows
    for node in shows[:5]:
        tab.page.evaluate(f"circuitPage.choose({{circuit: 0, place: ({PLACE_OF})({json.dumps(node['name'])})}})")
        assert HOSTILE in tab.text()
    assert tab.page.evaluate("window.broken") is None
    assert tab.page.evaluate("document.scripts.length") == 3
    assert tab.said == []


def test_what_is_saved(tab: Tab, one_view: dict[str, Any], pages: Path) -> None:
    def saved(button: str) -> bytes:
        with tab.page.expect_download() as waiting:
            tab.page.click(button)
        name = waiting.value.suggested_filename
        assert name.startswith("quotes.tiny.")
        return Path(waiting.value.path()).read_bytes()

    shown = json.loads(saved("#save-json"))
    assert shown == tab.visible()
    assert saved("#save-png").startswith(b"\x89PNG")
    drawn = saved("#save-svg").decode()
    assert drawn.count("<circle") == len(shown["nodes"]) and "broken" not in drawn.replace("&lt;/script&gt;", "")[:50]
    tab.click_on(one_view["nodes"][3]["name"])
    tab.page.fill("#body textarea", "finds the quote")
    tab.page.press("#body textarea", "Tab")
    # Beside the circuit's file it is what the next page shows.
    file = pages / "quotes.tiny.circuit.safetensors"
    labels_path(file).write_bytes(saved("#save-labels"))
    labels = read_labels(file)
    assert labels[one_view["nodes"][3]["name"]] == "finds the quote"
    assert len(labels) == 2


def test_two_circuits_side_by_side_with_links(browser: Any, one_view: dict[str, Any], pages: Path) -> None:
    place = one_view["points"][1]["nodes"][0]
    links = [{"left": 0, "right": 1, "kind": "decoder", "pairs": [[place, place, 0.8]]}]
    opened = Tab(browser, render([one_view, {**one_view, "name": "other"}], links=links).save(pages / "two.html"))
    shown = opened.visible()
    left, right = ([node["x"] for node in shown["nodes"] if node["circuit"] == side] for side in (0, 1))
    assert max(left) < min(right)
    name = one_view["nodes"][place]["name"]
    assert shown["links"] == [{"source": name, "target": name, "value": 0.8, "kind": "decoder"}]
    opened.click_on(name)
    assert "Across the bridge" in opened.text()
    # The name stands on both sides, joined by one link; a kind of link finds its ends; nothing else is a link.
    same = sum(name in node["name"] for node in shown["nodes"])
    opened.page.fill("#search", name)
    assert opened.page.inner_text("#found") == f"{same} found, 1 bridge links"
    opened.page.fill("#search", "DECODER")
    assert opened.page.inner_text("#found") == "0 found, 1 bridge links"
    ends = opened.page.evaluate("circuitPage.graph.nodes('.found').map(dot => dot.id())")
    assert sorted(ends) == [f"0:{place}", f"1:{place}"]
    opened.page.press("#search", "Enter")
    assert opened.text().startswith(name)
    opened.page.fill("#search", "no such thing")
    assert opened.page.inner_text("#found") == "0 found"
    assert opened.page.evaluate("circuitPage.graph.elements('.found').length") == 0
    opened.page.select_option("#right", "")
    assert {node["circuit"] for node in opened.visible()["nodes"]} == {0}
    assert opened.said == []
    opened.context.close()


def large(one_view: dict[str, Any], edges: int) -> dict[str, Any]:
    """A view with many edges: 400 reads and 400 neurons, joined at random."""
    node = next(node for node in one_view["nodes"] if node["kind"] == "mlp.act_in")
    nodes = [
        {**node, "name": f"0.{kind}.{channel}", "location": f"0.{kind}", "layer": 0, "kind": kind, "channel": channel}
        for kind in ("mlp.act_in", "mlp.post_act")
        for channel in range(400)
    ]
    chosen = [(i * 7919) % 160_000 for i in range(edges)]
    weights = [((i % 200) - 99.5) / 100 for i in range(edges)]
    many: dict[str, Any] = {
        "nodes": list(range(800)),
        "effect": [0.01] * 800,
        "pushes": [0.01] * 800,
        "correlation": [1.0] * 800,
        "pairs": [node["pairs"]] * 800,
        "edges": list(range(edges)),
        "edge_effect": weights,
    }
    return {
        **one_view,
        "nodes": nodes,
        "labels": {},
        "edges": {"source": [c // 400 for c in chosen], "target": [400 + c % 400 for c in chosen], "weight": weights},
        "points": [{**one_view["points"][1], **many}],
    }


def test_five_thousand_edges_open_in_three_seconds(browser: Any, one_view: dict[str, Any], pages: Path) -> None:
    page = render([large(one_view, 5000)])
    assert len(page.html) < 8 * 2**20
    opened = Tab(browser, page.save(pages / "large.html"))
    assert len(opened.visible()["edges"]) == 5000
    opening = opened.seconds()
    assert opening < OPENING
    opened.page.fill("#threshold", "0.3")
    assert opened.seconds() - opening < OPENING / 2
    opened.context.close()


def test_more_edges_than_can_be_drawn_are_grouped(browser: Any, one_view: dict[str, Any], pages: Path) -> None:
    opened = Tab(browser, render([large(one_view, 9000)]).save(pages / "grouped.html"))
    shown = opened.visible()
    assert shown["grouped"] and len(shown["nodes"]) == 2
    assert shown["edges"][0]["count"] == 9000
    assert "more than 6,000 edges" in opened.page.inner_text("#notes")
    # With fewer edges left the single nodes come back.
    opened.page.fill("#threshold", "0.5")
    assert len(opened.visible()["nodes"]) == 800 and len(opened.visible()["edges"]) == 2250
    opened.context.close()
