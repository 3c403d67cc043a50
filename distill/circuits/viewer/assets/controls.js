// Selects, search, sliders and toggles.

function choose(selected, show = true) {
  state.selected = selected;
  if (selected && show) state.tab = "node";
  markChosen();
  focusOn(null);
  if (selected && !selected.group) reveal(selected.circuit, selected.place);
  drawPanel();
}

function choosePoint(circuit, index) {
  state.points[circuit] = index;
  rebuild(true);
  drawControls();
  drawPanel();
  focusOn(null);
}

function drawSelects() {
  const options = page.circuits.map((view, i) => el("option", { value: String(i) }, view.name));
  const [one, other] = [byId("left"), byId("right")];
  one.replaceChildren(...options);
  other.replaceChildren(el("option", { value: "" }, "nothing"), ...options.map((option) => option.cloneNode(true)));
  one.value = String(state.left);
  other.value = state.right === null ? "" : String(state.right);
  one.onchange = () => changeSides(Number(one.value), state.right);
  other.onchange = () => changeSides(state.left, other.value === "" ? null : Number(other.value));
  for (const id of ["which", "beside"]) byId(id).hidden = page.circuits.length < 2;
}

function changeSides(one, other) {
  state.left = one;
  state.right = other === one ? null : other;
  state.selected = null;
  drawSelects();
  rebuild();
  drawControls();
  drawPanel();
}

function toggle(name, words, redraw) {
  const box = el("input", { type: "checkbox", id: `toggle-${name}`, onchange: () => { state[name] = box.checked; redraw(); drawControls(); } });
  box.checked = name === "grouped" ? grouped() : state[name];
  box.disabled = name === "grouped" && tooMany();
  return el("label", {}, box, words);
}

function drawControls() {
  byId("controls").replaceChildren(
    edgeSlider(),
    ...sides().filter((circuit) => page.circuits[circuit].points.length > 1).map(targetSlider),
    toggle("streams", "stream", refresh),
    toggle("names", "numbers", refresh),
    toggle("grouped", "by head and layer", () => rebuild()),
    ...(page.links.length ? [toggle("links", "bridge", refresh)] : []),
    el("button", { onclick: fit, title: "show everything" }, "fit"),
  );
  drawNotes();
  drawLegend();
}

function edgeSlider() {
  const said = el("output", { id: "edges" });
  const says = () => {
    const total = sides().reduce((sum, circuit) => sum + edgesOf(circuit).length, 0);
    const shown = sides().reduce((sum, circuit) => sum + shownEdges(circuit).length, 0);
    said.textContent = `${number(shown)} of ${number(total)}`;
  };
  const input = el("input", { type: "range", id: "threshold", min: "0", max: "1", step: "0.01", "aria-label": "leave out weak edges" });
  input.value = String(state.slider);
  input.addEventListener("input", () => {
    const before = grouped();
    state.slider = Number(input.value);
    says();
    if (before || grouped()) rebuild(before === grouped());
    else refresh();
    drawNotes();
    const box = byId("toggle-grouped");
    [box.checked, box.disabled] = [grouped(), tooMany()];
  });
  const by = el("select", { id: "by", "aria-label": "strength of an edge", onchange: () => { state.by = by.value; rebuild(true); drawControls(); } },
    el("option", { value: "weight" }, "weight"), el("option", { value: "effect" }, "effect"));
  by.value = state.by;
  says();
  return el("label", {}, "edges by ", by, input, said);
}

function targetSlider(circuit) {
  const { points } = page.circuits[circuit];
  const words = sides().length > 1 ? `target, ${page.circuits[circuit].name}` : "target";
  const said = el("output", {}, `${number(pointOf(circuit).target)} nats`);
  const input = el("input", { type: "range", class: "target", min: "0", max: String(points.length - 1), step: "1", "aria-label": words });
  input.value = String(state.points[circuit]);
  input.addEventListener("change", () => choosePoint(circuit, Number(input.value)));
  return el("label", {}, words, input, said);
}

function drawNotes() {
  const notes = [...page.notes];
  if (grouped()) {
    const why = tooMany() ? `more than ${number(LIMIT)} edges: ` : "";
    notes.push(`${why}drawn by head and layer; numbers are counts of nodes, lines are sums of weights`);
  }
  for (const circuit of sides()) {
    const out = page.circuits[circuit].edges_left_out;
    const { name, edges_note: without } = page.circuits[circuit];
    if (without) notes.push(`${name}: ${without}`);
    if (out) notes.push(`${page.circuits[circuit].name}: the ${number(out)} weakest edges are not in this page`);
  }
  const before = byId("notes").childElementCount;
  byId("notes").replaceChildren(...notes.map((text) => el("p", {}, text)));
  // They take room from the graph.
  if (plan && notes.length !== before) fit();
}

function drawLegend() {
  const key = (classes, words) => el("span", {}, el("i", { class: classes }), words);
  byId("legend").replaceChildren(
    key("dot", "pushes to the right answer"), key("dot down", "to the wrong one"),
    el("span", {}, "size: loss when left out"),
    key("", "weight above 0"), key("down", "below 0"), key("stream", "residual stream, same channel"),
    ...(page.links.length && sides().length > 1 ? [key("bridge", "across the bridge")] : []),
  );
}

/**
 * Nodes whose name, label or strongest tokens hold the words, and bridge links with such an end, or of such a kind,
 * with the nodes that they lead to. The first node is chosen on Enter.
 */
function search(words) {
  const wanted = words.trim().toLowerCase();
  graph.elements(".found").removeClass("found");
  if (!wanted) { byId("found").textContent = ""; return []; }
  const hits = sides().flatMap((circuit) => pointOf(circuit).nodes
    .filter((place) => nodeWords(circuit, place).includes(wanted))
    .map((place) => ({ circuit, place })));
  const keys = new Set(hits.map((hit) => `${hit.circuit}:${hit.place}`));
  graph.nodes(".dot").forEach((dot) => {
    const one = dot.data("item");
    if (one.places.some((place) => keys.has(`${one.circuit}:${place}`))) dot.addClass("found");
  });
  const links = graph.edges(".bridge").filter((edge) => edge.data("link").words.some((text) => text.includes(wanted)));
  links.addClass("found");
  const led = links.connectedNodes().not(".found").addClass("found");
  byId("found").textContent = `${number(hits.length)} found${links.length ? `, ${number(links.length)} bridge links` : ""}`;
  return [...hits, ...led.map((dot) => ({ circuit: dot.data("item").circuit, place: dot.data("item").places[0] }))];
}

function startSearch() {
  const field = byId("search");
  field.addEventListener("input", () => search(field.value));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const [first] = search(field.value);
    if (first) choose(first);
  });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing) { event.preventDefault(); field.focus(); }
    if (event.key === "Escape") { field.value = ""; search(""); choose(null, false); }
  });
}
