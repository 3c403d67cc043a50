// The other panels: the circuit as a whole, its scorecard, where it comes from.

const TABS = [
  ["node", "Node", () => (state.selected?.group ? groupPanel(state.selected) : state.selected ? nodePanel(state.selected) : emptyNode())],
  ["circuit", "Circuit", () => sides().map(circuitPanel)],
  ["text", "Text", () => sides().map(textPanel)],
  ["scorecard", "Scorecard", () => sides().map(scorecardPanel)],
  ["made", "Provenance", () => sides().map(provenancePanel)],
];

function drawTabs() {
  byId("tabs").replaceChildren(...TABS.map(([name, words]) => el("button", {
    role: "tab", id: `tab-${name}`, "aria-selected": String(state.tab === name), onclick: () => { state.tab = name; drawPanel(); },
  }, words)));
}

function drawPanel() {
  drawTabs();
  const tab = TABS.find(([name]) => name === state.tab);
  const body = byId("body");
  body.replaceChildren(...tab[2]().flat(3).filter(Boolean));
  body.scrollTop = 0;
}

function emptyNode() {
  return sides().flatMap((circuit) => [
    el("h2", {}, page.circuits[circuit].name),
    el("p", { class: "muted" }, "Choose a node in the graph, or one of those that matter most."),
    strongest(circuit, sides().length > 1 ? 8 : 16),
  ]);
}

function strongest(circuit, count) {
  const point = pointOf(circuit);
  const view = page.circuits[circuit];
  const order = point.nodes.map((place, i) => [place, point.effect[i]]).sort((a, b) => b[1] - a[1]).slice(0, count);
  return el("table", {},
    el("tr", {}, el("th", {}, "node, your label or its computed description"), el("th", { class: "number" }, "loss when left out")),
    order.map(([place, effect]) => el("tr", {},
      el("td", {}, nodeButton(circuit, place), el("span", { class: "words" }, view.labels[view.nodes[place].name] ?? firstClause(view.nodes[place]))),
      el("td", { class: "number" }, number(effect)))));
}

function firstClause(node) {
  return node.description ? node.description.text.split(";")[0] : "";
}

const COUNT_WORDS = {
  nodes: "nodes", edges_induced: "edges between them", edges_pruned: "edges kept", edges_embed: "embedding entries",
  edges_null: "edges if drawn blindly",
};
const LOSS_WORDS = {
  full: "whole model", empty: "all nodes ablated", circuit: "circuit", calibrated: "circuit, calibrated",
  competition: "circuit, with competition", verify: "circuit, prompts kept back",
};

function circuitPanel(circuit) {
  const view = page.circuits[circuit];
  const point = pointOf(circuit);
  return [
    el("h2", {}, view.name),
    el("p", { class: "muted" }, `target ${number(point.target)} nats${point.label ? ` · ${point.label}` : ""}`),
    el("h3", {}, "Size"),
    facts(Object.entries(point.counts).map(([name, value]) => [COUNT_WORDS[name] ?? name, number(value)])),
    el("h3", {}, "Task loss on validation prompts, nats (chance 0.693)"),
    facts(Object.entries(point.losses).map(([name, value]) => [LOSS_WORDS[name] ?? name, number(value)])),
    view.points.length > 1 ? [el("h3", {}, "Along the curve"), curve(circuit)] : null,
    el("h3", {}, "Nodes that matter most"),
    strongest(circuit, 10),
    el("p", { class: "muted" }, `Effects: change of the task loss in nats when one node is ${point.effect_kind === "first order" ? "left out, to first order" : "left out"}.`),
    view.edges_left_out ? el("p", { class: "muted" }, `${number(view.edges_left_out)} weakest edges are not in this page.`) : null,
  ];
}

/** Edges against target loss, a point for each circuit of the curve; a click chooses it. */
function curve(circuit) {
  const { points } = page.circuits[circuit];
  const [wide, high] = [360, 150];
  const scale = (values, from, to) => {
    const [low, top] = [Math.min(...values), Math.max(...values)].map(Math.log);
    return (value) => from + ((Math.log(value) - low) / (top - low || 1)) * (to - from);
  };
  const sizes = points.map((point) => Math.max(1, point.counts.edges_pruned));
  const x = scale(points.map((point) => point.target), 50, wide - 24);
  const y = scale(sizes, high - 34, 16);
  const path = points.map((point, i) => `${i ? "L" : "M"}${x(point.target)},${y(sizes[i])}`).join("");
  const dots = points.flatMap((point, i) => {
    const dot = svg("circle", {
      cx: x(point.target), cy: y(sizes[i]), r: i === state.points[circuit] ? 6 : 4, fill: i === state.points[circuit] ? UP : "#fff",
      stroke: UP, style: "cursor:pointer",
    });
    dot.addEventListener("click", () => choosePoint(circuit, i));
    return [dot, svg("text", { x: x(point.target), y: high - 14, "text-anchor": "middle" }, number(point.target)),
      svg("text", { x: x(point.target), y: y(sizes[i]) - 9, "text-anchor": "middle" }, number(sizes[i]))];
  });
  return svg("svg", { class: "curve", viewBox: `0 0 ${wide} ${high}` },
    svg("path", { d: path, fill: "none", stroke: UP, "stroke-width": 1.5 }), ...dots,
    svg("text", { x: wide / 2, y: high - 1, "text-anchor": "middle" }, "target loss, nats"),
    svg("text", { x: 4, y: 12 }, "edges kept"));
}

/** Held-out text, coloured by how strongly the circuit is at work at each token. */
function textPanel(circuit) {
  const view = page.circuits[circuit];
  const found = view.at_work;
  const head = el("h2", {}, view.name);
  if (found.reason) return [head, el("p", { class: "muted" }, `Not measured: ${found.reason}.`)];
  return [
    head,
    el("p", { class: "muted" }, `Held-out text; the darker a token, the further the nodes that decide the task are from what they usually are
      (strength, 0 to ${number(found.largest)}; circuit of target ${number(found.target)}). Marked: above ${number(found.threshold)}, as ${number(100 * found.fpr)}% of such tokens are.
      A circuit is rightly at work in some of them.`),
    found.rows.map((row) => [el("h4", {}, `window ${row.window}`),
      tokenLine(view, view.windows[row.window], row.strength, found.largest, null, found.threshold)]),
  ];
}

function scorecardPanel(circuit) {
  const view = page.circuits[circuit];
  const card = view.scorecard;
  if (!card) {
    return [el("h2", {}, view.name), el("p", {}, "No scorecard lies beside this circuit, so nothing says how far to believe it. To make one:"),
      el("pre", {}, `python recipes/check_circuit.py --circuit ${view.file}.circuit.safetensors`)];
  }
  return [
    el("h2", {}, view.name),
    el("p", {}, card.verdict),
    el("table", {},
      el("tr", {}, ["check", "value", "control", "threshold", "verdict"].map((word, i) => el("th", { class: i && i < 4 ? "number" : "" }, word))),
      card.checks.map(checkRows)),
  ];
}

function checkRows(check) {
  const middle = typicalControl(check.control);
  return [
    el("tr", {}, el("td", {}, check.name),
      [check.value, middle, check.threshold].map((value) => el("td", { class: "number" }, number(value))),
      el("td", {}, el("span", { class: `verdict ${check.verdict}` }, check.verdict))),
    el("tr", {}, el("td", { class: "reason", colspan: "5" }, check.reason)),
  ];
}

function typicalControl(control) {
  if (!Array.isArray(control)) return typeof control === "number" ? control : null;
  const order = control.filter((value) => typeof value === "number").sort((a, b) => a - b);
  return order.length ? order[Math.floor(order.length / 2)] : null;
}

function provenancePanel(circuit) {
  const view = page.circuits[circuit];
  const index = state.points[circuit];
  const { model } = view;
  return [
    el("h2", {}, view.name),
    facts([["model", model.name], ["fingerprint", model.fingerprint.slice(0, 16)], ["layers", number(model.n_layer)], ["width", number(model.d_model)],
      ["heads", `${model.n_head} of ${model.d_head}`], ["non-zero weights", `${number(100 * model.density)}%`], ["nodes in the model", number(model.nodes)]]),
    el("h3", {}, "The circuit"), el("pre", {}, JSON.stringify(view.provenance.circuits[index], null, 1)),
    el("h3", {}, "This page"), el("pre", {}, JSON.stringify({ ...view.provenance.view, ...page.versions }, null, 1)),
  ];
}
