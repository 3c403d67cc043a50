// What can be saved from the page: the graph as PNG, SVG or JSON, and the reader's labels.

function save(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function fileName(ending) {
  return `${sides().map((circuit) => page.circuits[circuit].file).join("+")}.${ending}`;
}

function savePng() {
  save(fileName("png"), "image/png", graph.png({ output: "blob", full: true, scale: 2, bg: "#ffffff", maxWidth: 8000, maxHeight: 8000 }));
}

/** The graph that is to be seen, as plain values. */
function visibleGraph() {
  const shown = (edges) => edges.filter((edge) => !edge.hasClass("hidden"));
  const name = (id) => graph.getElementById(id).data("item");
  const title = (one) => (one.group ? one.group : page.circuits[one.circuit].nodes[one.places[0]].name);
  const ends = (edge) => ({ source: title(name(edge.data("source"))), target: title(name(edge.data("target"))) });
  return {
    circuits: sides().map((circuit) => ({ name: page.circuits[circuit].name, target: pointOf(circuit).target })),
    by: state.by,
    grouped: grouped(),
    nodes: graph.nodes(".dot").filter((dot) => !dot.hasClass("absent")).map((dot) => {
      const one = dot.data("item");
      return { circuit: one.circuit, name: title(one), nodes: one.places.length, effect: one.effect, pushes: one.pushes, ...dot.position() };
    }),
    edges: shown(graph.edges(".weight")).map((edge) => {
      const { weight, effect, count } = edge.data("join");
      return { circuit: edge.data("circuit"), ...ends(edge), weight, effect, count };
    }),
    streams: shown(graph.edges(".stream")).map(ends),
    links: shown(graph.edges(".bridge")).map((edge) => ({ ...ends(edge), value: edge.data("link").value, kind: edge.data("link").kind })),
  };
}

function saveJson() {
  save(fileName("json"), "application/json", JSON.stringify(visibleGraph(), null, 1));
}

/** The graph as a drawing of its own: cells, lines, dots, headings. */
function drawing() {
  const box = graph.elements().boundingBox();
  const [x, y] = [box.x1 - 90, box.y1 - 50];
  const root = svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `${x} ${y} ${box.x2 - x + 20} ${box.y2 - y + 20}`, "font-family": "sans-serif", "font-size": 11 });
  for (const cell of plan.cells) {
    root.append(svg("rect", { x: cell.x - 4, y: cell.y - 3, width: cell.width + 8, height: cell.height + 6, rx: 5, fill: "#f4f4f0" }));
  }
  graph.edges().filter((edge) => !edge.hasClass("hidden")).forEach((edge) => root.append(drawnLine(edge)));
  graph.nodes(".dot").filter((dot) => !dot.hasClass("absent")).forEach((dot) => root.append(...drawnDot(dot)));
  for (const column of plan.columns) root.append(svg("text", { x: column.x, y: y + 34, "text-anchor": "middle" }, column.text));
  for (const block of plan.blocks) root.append(svg("text", { x: block.middle, y: y + 16, "text-anchor": "middle", "font-weight": "bold" }, page.circuits[block.circuit].name));
  for (const row of plan.rows) root.append(svg("text", { x: box.x1 - 12, y: row.y + 4, "text-anchor": "end" }, row.text.replace("\n", " ")));
  return root;
}

function drawnLine(edge) {
  const [from, to] = [edge.source().position(), edge.target().position()];
  const stream = edge.hasClass("stream");
  const bridge = edge.hasClass("bridge");
  return svg("line", {
    x1: from.x, y1: from.y, x2: to.x, y2: to.y,
    stroke: stream ? "#a5a9a2" : bridge ? BRIDGE : edge.data("colour"), "stroke-width": stream ? 0.8 : edge.data("width"),
    "stroke-opacity": stream || bridge ? 0.5 : edge.data("opacity"), "stroke-dasharray": stream ? "3 4" : bridge ? "1 3" : "none",
  });
}

function drawnDot(dot) {
  const { x, y } = dot.position();
  const size = dot.data("size");
  const label = state.names ? [svg("text", { x, y: y + size / 2 + 9, "text-anchor": "middle", "font-size": 9, fill: "#4b5158" }, dot.data("label"))] : [];
  return [svg("circle", { cx: x, cy: y, r: size / 2, fill: dot.data("colour"), stroke: "#fff" }), ...label];
}

function saveSvg() {
  save(fileName("svg"), "image/svg+xml", new XMLSerializer().serializeToString(drawing()));
}

function saveLabels() {
  for (const circuit of sides()) {
    const view = page.circuits[circuit];
    save(`${view.file}.labels.json`, "application/json", `${JSON.stringify(view.labels, null, 1)}\n`);
  }
  state.unsaved = false;
  drawExports();
}

function drawExports() {
  byId("exports").replaceChildren(
    el("button", { id: "save-png", onclick: savePng, title: "save the graph as a picture" }, "PNG"),
    el("button", { id: "save-svg", onclick: saveSvg, title: "save the graph as a drawing" }, "SVG"),
    el("button", { id: "save-json", onclick: saveJson, title: "save the visible graph as JSON" }, "JSON"),
    el("button", { id: "save-labels", onclick: saveLabels, title: "save your labels; put the file beside the circuit" }, state.unsaved ? "labels •" : "labels"),
  );
}
