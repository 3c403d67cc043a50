// Text with its tokens coloured by a node's activation, and attention patterns.

/** A line of tokens; `values` colour them against `most`, `here` is the place of the one that is meant; the tokens above
    `threshold` are marked. */
function tokenLine(view, tokens, values, most, here = null, threshold = Infinity) {
  const parts = tokens.map((place, i) => {
    const text = tokenText(view, place);
    const value = values[i];
    const span = el("span", { class: i === here ? "here" : value > threshold ? "flag" : "", title: `${visibleText(text)}  ${number(value)}` }, visibleText(text));
    if (value) span.style.background = shade(value, most);
    return span;
  });
  return el("div", { class: "text" }, parts);
}

function shade(value, most) {
  const share = Math.min(1, Math.abs(value) / (most || 1));
  const [r, g, b] = value > 0 ? [47, 109, 181] : [210, 105, 30];
  return `rgba(${r},${g},${b},${(0.08 + 0.55 * share).toFixed(2)})`;
}

function largest(lists) {
  return Math.max(...lists.flat(2).map(Math.abs), 1e-12);
}

const GROUPS = [
  ["top", "largest"],
  ["q", "at quantiles of the tokens where it is not 0"],
  ["bottom", "smallest (below 0)"],
];

/** Examples of a node from the held-out text: largest, in between, smallest. */
function corpusExamples(view, node) {
  if (!node.examples) return [el("p", { class: "muted" }, "Left out: the page would have become too large. The strongest nodes have theirs.")];
  if (!node.examples.length) return [el("p", { class: "muted" }, "Zero on all of the held-out text looked at.")];
  const most = largest(node.examples.map((one) => one.values));
  return GROUPS.flatMap(([group, words]) => {
    const mine = node.examples.filter((one) => one.group.startsWith(group));
    if (!mine.length) return [];
    return [el("h4", {}, words), ...mine.map((one) => exampleRow(view, one, most))];
  });
}

function exampleRow(view, one, most) {
  const tokens = view.windows[one.window].slice(one.start, one.stop);
  const here = one.position - one.start;
  const mark = one.group.startsWith("q") ? `${number(100 * Number(one.group.slice(1)))}%` : number(one.values[here]);
  return el("div", { class: "row" }, el("span", { class: "muted", title: number(one.values[here]) }, mark), tokenLine(view, tokens, one.values, most, here));
}

/** The shown task pairs side by side, each in the model and in the circuit. */
function pairExamples(view, point, place) {
  const node = view.nodes[place];
  const index = point.nodes.indexOf(place);
  if (!node.pairs) return [el("p", { class: "muted" }, "Left out: the page would have become too large.")];
  const ours = index < 0 ? null : point.pairs[index];
  const most = largest(ours ? [node.pairs, ours] : [node.pairs]);
  const half = view.pairs.length;
  return view.pairs.map((pair, i) =>
    el("div", { class: "two" },
      ["clean", "corrupt"].map((name, second) => {
        const row = i + second * half;
        const prompt = pair[name];
        return el("div", {},
          el("h4", {}, `answer ${visibleText(tokenText(view, prompt.answer))}`),
          el("div", { class: "muted" }, "model"), tokenLine(view, prompt.tokens, node.pairs[row], most),
          ours ? [el("div", { class: "muted" }, "circuit"), tokenLine(view, prompt.tokens, ours[row], most)] : null);
      })));
}

/** A head's attention on one prompt of a chosen pair, in the model and in the circuit. */
function headPanel(view, point, layer, head) {
  const index = view.heads.findIndex((one) => one.layer === layer && one.head === head);
  if (index < 0) return [];
  const select = el("select", { "aria-label": "prompt", onchange: () => { state.pair = Number(select.value); draw(); } });
  const half = view.pairs.length;
  for (let row = 0; row < 2 * half; row += 1) {
    const name = row < half ? "clean" : "corrupt";
    select.append(el("option", { value: String(row) }, `pair ${(row % half) + 1}, ${name}`));
  }
  select.value = String(Math.min(state.pair, 2 * half - 1));
  const place = el("div", {});
  const draw = () => place.replaceChildren(...patternPair(view, view.heads[index].pattern, point.heads[index], Number(select.value)));
  draw();
  return [el("h3", {}, `Attention of head ${head}, layer ${layer}`), select, place];
}

function patternPair(view, model, circuit, row) {
  const half = view.pairs.length;
  const prompt = row < half ? view.pairs[row].clean : view.pairs[row - half].corrupt;
  const says = el("div", { class: "muted" }, "Rows: the token that looks; columns: the one looked at. Point at a cell.");
  const spoken = (q, k, of) => {
    const [from, to] = [q, k].map((i) => visibleText(tokenText(view, prompt.tokens[i])));
    says.textContent = `${from} → ${to}: model ${of.model}%, circuit ${of.circuit}%`;
  };
  const values = (q, k) => { const at = (q * (q + 1)) / 2 + k; return { model: model[row][at], circuit: circuit[row][at] }; };
  const both = [["model", model[row]], ["circuit", circuit[row]]].map(([name, pattern]) =>
    el("div", {}, el("h4", {}, name), patternCanvas(pattern, prompt.tokens.length, (q, k) => spoken(q, k, values(q, k)))));
  const last = prompt.tokens.length - 1;
  const lines = [["model", model[row]], ["circuit", circuit[row]]].map(([name, pattern]) =>
    el("div", {}, el("div", { class: "muted" }, `from the last token, ${name}`),
      tokenLine(view, prompt.tokens, pattern.slice((last * (last + 1)) / 2), 100)));
  return [el("div", { class: "two" }, both), says, ...lines];
}

function patternCanvas(pattern, size, onPoint) {
  const cell = Math.max(4, Math.floor(190 / size));
  const canvas = el("canvas", { class: "pattern", width: String(size * cell), height: String(size * cell) });
  const pen = canvas.getContext("2d");
  for (let q = 0, at = 0; q < size; q += 1) {
    for (let k = 0; k <= q; k += 1, at += 1) {
      pen.fillStyle = `rgba(47,109,181,${pattern[at] / 100})`;
      pen.fillRect(k * cell, q * cell, cell, cell);
    }
  }
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [k, q] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((x) => Math.floor(x * size));
    if (q >= k && q < size && k >= 0) onPoint(q, k);
  });
  return canvas;
}
