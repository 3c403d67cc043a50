// What the panel says about a node, and about a group of them.

function nodePanel({ circuit, place }) {
  const view = page.circuits[circuit];
  const node = view.nodes[place];
  const point = pointOf(circuit);
  return [
    el("h2", { class: "name" }, node.name),
    el("p", { class: "muted" }, `${kindWords(view, node)} · ${view.name}`),
    point.nodes.includes(place) ? null : el("p", { class: "muted" }, "Not in the circuit at this target."),
    labelField(view, node),
    describedBox(view, node),
    nodeFacts(view, point, place),
    el("h3", {}, "Edges"),
    edgeTables(circuit, place),
    streamTables(circuit, place),
    linkTable(circuit, place),
    el("h3", {}, "On the task's pairs"),
    pairExamples(view, point, place),
    node.head === null ? null : headPanel(view, point, node.layer, node.head),
    el("h3", {}, "In held-out text (in the model)"),
    corpusExamples(view, node),
  ];
}

function kindWords(view, node) {
  const words = ROWS[ROW_OF[node.kind]].words;
  const beyond = node.kind.endsWith("act_in") && node.channel >= view.model.d_model ? ", a position channel" : "";
  const head = node.head === null ? "" : ` of head ${node.head}`;
  return `${words}${head}, layer ${node.layer}, channel ${node.channel}${beyond}`;
}

function labelField(view, node) {
  const field = el("textarea", { rows: "1", placeholder: "your label", "aria-label": "your label" });
  field.value = view.labels[node.name] ?? "";
  field.addEventListener("change", () => {
    if (field.value.trim()) view.labels[node.name] = field.value.trim();
    else delete view.labels[node.name];
    state.unsaved = true;
    rebuild(true);
    drawExports();
  });
  return field;
}

function describedBox(view, node) {
  if (!node.description) return null;
  const { text, reads, raises, lowers, profile } = node.description;
  const more = [
    ["embedding", reads], ["raises", raises], ["lowers", lowers],
  ].filter(([, list]) => list?.length).map(([words, list]) => tokenList(view, words, list));
  return el("div", { class: "computed" },
    el("small", {}, "computed from examples and weights, checked by nobody"),
    el("div", {}, text), more,
    el("small", {}, "mean size along the text"), profileBars(profile));
}

function tokenList(view, words, list) {
  const tokens = list.flatMap(([token, value], i) => [
    i ? "  " : " ", el("code", {}, visibleText(tokenText(view, token))), " ", signed(value),
  ]);
  return el("div", { class: "muted" }, `${words}:`, tokens);
}

function profileBars(profile) {
  const bars = profile.map((value, i) =>
    svg("rect", { x: i * 20 + 1, y: 16 - 15 * value, width: 18, height: Math.max(0.5, 15 * value), fill: "#b9bdb6" }));
  return svg("svg", { class: "profile", viewBox: `0 0 ${profile.length * 20} 17`, preserveAspectRatio: "none", style: "height:1.4rem" }, ...bars);
}

function facts(pairs) {
  return el("dl", { class: "facts" }, pairs.map(([words, value, title]) =>
    el("div", { title: title ?? "" }, el("dt", {}, words), el("dd", {}, value))));
}

function nodeFacts(view, point, place) {
  const node = view.nodes[place];
  const index = point.nodes.indexOf(place);
  const at = (list) => (index < 0 ? null : list[index]);
  const mean = (rows) => (rows ? rows.flat().reduce((sum, x) => sum + x, 0) / Math.max(1, rows.flat().length) : null);
  const effect = at(point.effect);
  return facts([
    ["loss when left out", effect === null ? "–" : el("span", {}, effect > 0 ? "+" : "", number(effect), " nats"), `change of the task loss, ${point.effect_kind}`],
    ["pushes the answer by", signed(at(point.pushes)), "share in the logit of the right answer against the wrong one (integrated gradients)"],
    ["circuit against model, r", number(at(point.correlation), 2), "correlation of its activations over the task's prompts"],
    ["mean on the pairs, model", number(mean(node.pairs))],
    ["mean on the pairs, circuit", number(index < 0 ? null : mean(point.pairs?.[index]))],
    ["ablation value", number(node.mean), "what it is set to when it is left out: its mean"],
    node.direct === null ? null : ["moves the answer directly", signed(node.direct), "logit of the answer against the other per unit, before the final norm's scale"],
  ].filter(Boolean));
}

function nodeButton(circuit, place) {
  return el("button", { class: "node", onclick: () => choose({ circuit, place }) }, page.circuits[circuit].nodes[place].name);
}

function edgeTables(circuit, place) {
  const { in: into, out } = edgesAt(circuit, place);
  return el("div", { class: "two wide" }, edgeTable(`in (${into.length})`, circuit, into, "source"), edgeTable(`out (${out.length})`, circuit, out, "target"));
}

const ROWS_SHOWN = 40;

function edgeTable(words, circuit, edges, end) {
  const rows = edges.slice(0, ROWS_SHOWN).map((edge) => el("tr", {},
    el("td", {}, nodeButton(circuit, edge[end])),
    el("td", { class: "number", title: `loss when left out: ${number(edge.effect)} nats, to first order` }, signed(edge.weight))));
  const more = edges.length > ROWS_SHOWN ? el("p", { class: "muted" }, `and ${edges.length - ROWS_SHOWN} weaker ones`) : null;
  return el("div", {}, el("table", {}, el("tr", {}, el("th", {}, words), el("th", { class: "number" }, "weight")), rows), more);
}

/** Who writes what a read sees, who reads what a write says. */
function streamTables(circuit, place) {
  const items = page.circuits[circuit].nodes.map((node, i) => ({
    id: String(i), places: [i], layer: node.layer, row: ROW_OF[node.kind], kept: pointOf(circuit).nodes.includes(i),
  }));
  const near = streamsOf(circuit, items).filter((one) => one.from === String(place) || one.to === String(place));
  if (!near.length) return null;
  const others = near.map((one) => Number(one.from === String(place) ? one.to : one.from));
  const words = near[0].from === String(place) ? "read again, on the same channel, by" : "written before, on the same channel, by";
  return [el("h4", {}, words), el("div", {}, others.flatMap((other, i) => [i ? ", " : "", nodeButton(circuit, other)]))];
}

function linkTable(circuit, place) {
  const found = page.links.flatMap((link) => link.pairs.flatMap(([mine, other, value]) => {
    if (link.left === circuit && mine === place) return [[link, link.right, other, value]];
    if (link.right === circuit && other === place) return [[link, link.left, mine, value]];
    return [];
  }));
  if (!found.length) return null;
  found.sort((a, b) => Math.abs(b[3]) - Math.abs(a[3]));
  return [el("h3", {}, "Across the bridge"), el("table", {},
    el("tr", {}, el("th", {}, "node of the other model"), el("th", {}, "how"), el("th", { class: "number" }, "strength")),
    found.slice(0, ROWS_SHOWN).map(([link, other, at, value]) => el("tr", {},
      el("td", {}, nodeButton(other, at)), el("td", { class: "muted" }, link.kind), el("td", { class: "number" }, signed(value)))))];
}

function groupPanel(item) {
  const view = page.circuits[item.circuit];
  const point = pointOf(item.circuit);
  const effects = new Map(point.nodes.map((place, i) => [place, point.effect[i]]));
  const places = [...item.places].sort((a, b) => Math.abs(effects.get(b)) - Math.abs(effects.get(a)));
  const node = view.nodes[places[0]];
  return [
    el("h2", { class: "name" }, item.group),
    el("p", { class: "muted" }, `${places.length} nodes drawn as one · ${view.name}`),
    el("table", {}, el("tr", {}, el("th", {}, "node"), el("th", { class: "number" }, "loss when left out")),
      places.slice(0, 200).map((place) => el("tr", {}, el("td", {}, nodeButton(item.circuit, place)), el("td", { class: "number" }, number(effects.get(place)))))),
    places.length > 200 ? el("p", { class: "muted" }, `and ${places.length - 200} with less effect`) : null,
    node.head === null ? null : headPanel(view, point, node.layer, node.head),
  ];
}
