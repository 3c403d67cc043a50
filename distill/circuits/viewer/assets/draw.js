// The graph itself: dots and lines by Cytoscape, headings that stay at the edges.

// Dots, lines and cells are layered by z-index alone.
const STYLE = [
  { selector: "*", style: { "z-index-compare": "manual" } },
  { selector: "node.dot", style: {
    width: "data(size)", height: "data(size)", "background-color": "data(colour)", "border-width": 1,
    "border-color": "#ffffff", label: "data(label)", "font-size": 10, color: "#4b5158", "text-valign": "bottom",
    "text-margin-y": 1, "text-background-color": "#f4f4f0", "text-background-opacity": 0.7, "min-zoomed-font-size": 8, "z-index": 10 } },
  { selector: "node.square", style: { shape: "round-rectangle" } },
  { selector: "node.unnamed", style: { label: "" } },
  { selector: "node.user", style: { "font-weight": "bold", color: "#1f2328" } },
  { selector: "node.absent", style: { display: "none" } },
  { selector: "node.cell", style: {
    shape: "round-rectangle", width: "data(width)", height: "data(height)", "background-color": "#f4f4f0",
    events: "no", "z-index": 0 } },
  { selector: "edge", style: {
    "curve-style": "haystack", "haystack-radius": 0, "line-color": "data(colour)", width: "data(width)",
    opacity: "data(opacity)", "z-index": 5 } },
  { selector: "edge.stream", style: {
    "curve-style": "straight", "line-style": "dashed", "line-dash-pattern": [3, 4], "line-color": "#a5a9a2", width: 0.8,
    opacity: 0.5, events: "no", "z-index": 2 } },
  { selector: "edge.bridge", style: {
    "curve-style": "unbundled-bezier", "control-point-distances": 40, "line-style": "dotted", "line-color": BRIDGE,
    width: "data(width)", opacity: 0.55, events: "no", "z-index": 4 } },
  { selector: ".hidden", style: { display: "none" } },
  { selector: ".faint", style: { opacity: 0.2 } },
  { selector: "edge.bridge.found", style: { "line-style": "solid", opacity: 0.9, "z-index": 6 } },
  { selector: "node.found", style: { "border-width": 3, "border-color": "#e0a800" } },
  { selector: "node.chosen", style: { "border-width": 3, "border-color": "#1f2328" } },
  { selector: "edge.near", style: { opacity: 0.95 } },
];

let graph = null;
let plan = null;

function startGraph(onSelect) {
  graph = cytoscape({
    container: byId("graph"), style: STYLE, layout: { name: "preset" }, minZoom: 0.05, maxZoom: 6,
    autoungrabify: true, boxSelectionEnabled: false, selectionType: "single",
  });
  graph.on("tap", "node.dot", (event) => onSelect(event.target.data("item")));
  graph.on("tap", (event) => { if (event.target === graph) onSelect(null); });
  graph.on("mouseover", "node.dot", (event) => focusOn(event.target));
  graph.on("mouseout", "node.dot", () => focusOn(null));
  graph.on("viewport resize", drawHeadings);
}

/** Builds everything anew: for other circuits, targets, or another grouping. */
function rebuild(keepView = false) {
  const blocks = sides().map((circuit, side) => {
    const items = itemsOf(circuit);
    return { circuit, side, items, joins: joinsOf(circuit, items), layers: page.circuits[circuit].model.n_layer };
  });
  const box = byId("graph").getBoundingClientRect();
  plan = { blocks, ...layout(blocks, Math.max(box.width, 300), Math.max(box.height, 200)) };
  graph.batch(() => {
    graph.elements().remove();
    graph.add([...cellElements(), ...blocks.flatMap(dotElements), ...blocks.flatMap(edgeElements), ...streamElements(), ...linkElements()]);
  });
  refresh();
  if (!keepView) fit();
  drawHeadings();
}

function cellElements() {
  return plan.cells.map((box, index) => ({
    group: "nodes", classes: "cell", data: { id: `cell${index}`, width: box.width + 8, height: box.height + 6 },
    position: { x: box.x + box.width / 2, y: box.y + box.height / 2 },
  }));
}

function dotElements(block) {
  const most = Math.max(...block.items.map((one) => one.effect), 1e-9);
  const labels = page.circuits[block.circuit].labels;
  return block.items.map((one) => {
    const own = one.group ? "" : labels[page.circuits[one.circuit].nodes[one.places[0]].name];
    const classes = ["dot", one.group ? "square" : "", own ? "user" : "", one.kept ? "" : "absent"].join(" ");
    return {
      group: "nodes", classes, position: { ...plan.positions.get(one.id) },
      data: {
        id: one.id, item: one, label: own ? shortened(own) : one.label, colour: dotColour(one),
        size: 8 + 14 * Math.sqrt(one.effect / most),
      },
    };
  });
}

function shortened(text) {
  return text.length > 14 ? `${text.slice(0, 13)}…` : text;
}

/** Blue where a node pushes to the right answer, orange to the wrong one, grey where it hardly does either. */
function dotColour(one) {
  const sum = pointOf(one.circuit).pushes.reduce((total, push) => total + Math.abs(push), 0) || 1;
  const share = Math.min(1, (Math.abs(one.pushes) / sum) * 25);
  return mix("#b9bdb6", one.pushes < 0 ? DOWN : UP, 0.15 + 0.85 * share);
}

function mix(from, to, share) {
  const part = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  const channel = (at) => Math.round(part(from, at) * (1 - share) + part(to, at) * share);
  return `rgb(${channel(1)},${channel(3)},${channel(5)})`;
}

function edgeElements(block) {
  const size = (join) => (join.count > 1 ? join.size : Math.abs(join.weight));
  const most = Math.max(...block.joins.map(size), 1e-12);
  // Where there are many, the weak ones must not cover the strong ones.
  const ground = 0.22 * Math.min(1, Math.sqrt(250 / Math.max(1, block.joins.length)));
  return block.joins.map((join) => ({
    group: "edges", classes: "weight",
    data: {
      id: join.id, source: join.from, target: join.to, join, circuit: block.circuit, colour: join.weight < 0 ? DOWN : UP,
      width: 0.5 + 3 * (size(join) / most), opacity: ground + 0.6 * (size(join) / most) ** (join.count > 1 || block.joins.length < 250 ? 0.5 : 1),
    },
  }));
}

function streamElements() {
  return plan.blocks.flatMap((block) => streamsOf(block.circuit, block.items)).map((one) => ({
    group: "edges", classes: "stream", data: { id: one.id, source: one.from, target: one.to },
  }));
}

function linkElements() {
  if (plan.blocks.length < 2) return [];
  const links = linksShown(plan.blocks.flatMap((block) => block.items));
  return links.map((one) => ({
    group: "edges", classes: "bridge",
    data: { id: one.id, source: one.from, target: one.to, link: one, width: 0.6 + 2.2 * Math.min(1, Math.abs(one.value)) },
  }));
}

/** Shows and hides what the slider and the toggles say, without moving anything. */
function refresh() {
  const limits = new Map(plan.blocks.map((block) => [block.circuit, grouped() ? Infinity : left(block.joins.length)]));
  graph.batch(() => {
    graph.edges(".weight").forEach((edge) => {
      edge.toggleClass("hidden", edge.data("join").rank >= limits.get(edge.data("circuit")));
    });
    graph.edges(".stream").toggleClass("hidden", !state.streams);
    graph.edges(".bridge").toggleClass("hidden", !state.links);
    graph.nodes(".dot").toggleClass("unnamed", !state.names);
    markChosen();
  });
}

function markChosen() {
  graph.nodes(".chosen").removeClass("chosen");
  if (!state.selected) return;
  const { circuit, place } = state.selected;
  graph.nodes(".dot").forEach((dot) => {
    const one = dot.data("item");
    if (one.circuit === circuit && one.places.includes(place)) dot.addClass("chosen");
  });
}

/** Lets everything fade but a dot and its neighbours; nothing fades for null. */
function focusOn(dot) {
  graph.batch(() => {
    graph.elements().removeClass("faint near");
    const centre = dot ?? graph.nodes(".chosen");
    if (centre.length === 0) return;
    const near = centre.union(centre.connectedEdges(":visible")).union(centre.connectedEdges(":visible").connectedNodes());
    graph.elements().not(near).not(".cell").addClass("faint");
    centre.connectedEdges().addClass("near");
  });
}

function fit() {
  graph.resize();
  graph.fit(graph.nodes(".cell"), 12);
}

/** Moves the view to a node, if it is outside. */
function reveal(circuit, place) {
  const dot = graph.nodes(".dot").filter((one) => one.data("item").circuit === circuit && one.data("item").places.includes(place));
  if (dot.empty()) return;
  const at = dot.renderedPosition();
  const box = byId("graph").getBoundingClientRect();
  if (at.x < 0 || at.y < 0 || at.x > box.width || at.y > box.height) graph.center(dot);
}

/** Layers above and locations beside the graph; they follow it, at a size that can be read. */
function drawHeadings() {
  if (!plan) return;
  const zoom = graph.zoom();
  const pan = graph.pan();
  const columns = byId("columns");
  const rows = byId("rows");
  columns.replaceChildren(
    ...plan.columns.map((column) => {
      const narrow = column.width * zoom < 48;
      return heading(narrow ? column.text.replace("layer ", "") : column.text, { left: column.x * zoom + pan.x });
    }),
    ...plan.blocks.map((block) => {
      const made = heading(page.circuits[block.circuit].name, { left: block.middle * zoom + pan.x });
      made.classList.add("side");
      return made;
    }),
  );
  rows.replaceChildren(...plan.rows.map((row) => heading(row.text, { top: row.y * zoom + pan.y })));
}

function heading(text, place) {
  const made = el("div", { class: "heading" }, ...text.split("\n").flatMap((line, i) => (i ? [el("br"), line] : [line])));
  for (const [side, value] of Object.entries(place)) made.style[side] = `${value}px`;
  return made;
}
