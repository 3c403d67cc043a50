// What the reader has chosen, and what is to be seen because of it. Nothing in this file touches the page.

const LIMIT = page.limits.edges_shown;

const state = {
  left: 0,
  right: page.links.length ? 1 : null,
  points: page.circuits.map((view) => closestPoint(view)),
  slider: 0,
  by: "weight",
  streams: true,
  names: true,
  grouped: false,
  links: true,
  selected: null,
  tab: "node",
  pair: 0,
};

/** The point whose circuit is shown first: that of the usual target. */
function closestPoint(view) {
  const gaps = view.points.map((point) => Math.abs(Math.log(point.target / page.limits.target)));
  return gaps.indexOf(Math.min(...gaps));
}

/** Numbers of the circuits that are shown, left to right. */
function sides() {
  return state.right === null ? [state.left] : [state.left, state.right];
}

function pointOf(circuit) {
  return page.circuits[circuit].points[state.points[circuit]];
}

const sorted = new Map();

/** Edges of the circuit at its chosen target, the strongest first. */
function edgesOf(circuit) {
  const key = `${circuit}/${state.points[circuit]}/${state.by}`;
  if (!sorted.has(key)) {
    const { edges } = page.circuits[circuit];
    const point = pointOf(circuit);
    const found = point.edges.map((place, i) => ({
      place,
      source: edges.source[place],
      target: edges.target[place],
      weight: edges.weight[place],
      effect: point.edge_effect[i],
    }));
    found.sort((a, b) => Math.abs(b[state.by]) - Math.abs(a[state.by]) || a.place - b.place);
    sorted.set(key, found);
  }
  return sorted.get(key);
}

/** How many of a number of edges the slider leaves; it is finer where few are left. */
function left(total) {
  return Math.round(total * (1 - state.slider) ** 2);
}

function shownEdges(circuit) {
  const edges = edgesOf(circuit);
  return edges.slice(0, left(edges.length));
}

/** Whether the circuits are drawn by head and layer: asked for, or too many edges for single ones. */
function grouped() {
  return state.grouped || tooMany();
}

function tooMany() {
  return sides().reduce((sum, circuit) => sum + shownEdges(circuit).length, 0) > LIMIT;
}

function groupOf(node) {
  return node.head === null ? node.location : `${node.location} head ${node.head}`;
}

/** What is drawn as one dot: a node, or all nodes of a head or a location. */
function itemsOf(circuit) {
  const view = page.circuits[circuit];
  const mine = new Map(pointOf(circuit).nodes.map((place, i) => [place, i]));
  if (!grouped()) {
    return view.nodes.map((node, place) => item(circuit, node, [place], String(node.channel), mine));
  }
  const groups = new Map();
  view.nodes.forEach((node, place) => {
    if (!mine.has(place)) return;
    const name = groupOf(node);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(place);
  });
  return [...groups].map(([name, places]) => {
    const node = view.nodes[places[0]];
    const label = node.head === null ? `${places.length}` : `h${node.head}: ${places.length}`;
    return { ...item(circuit, node, places, label, mine), group: name };
  });
}

function item(circuit, node, places, label, mine) {
  const point = pointOf(circuit);
  const indices = places.map((place) => mine.get(place)).filter((index) => index !== undefined);
  return {
    id: `${circuit}:${places[0]}`,
    circuit,
    places,
    label,
    layer: node.layer,
    row: ROW_OF[node.kind],
    order: (node.head ?? 0) * 1e5 + node.channel,
    kept: indices.length > 0,
    effect: indices.reduce((sum, index) => sum + Math.abs(point.effect[index]), 0),
    pushes: indices.reduce((sum, index) => sum + point.pushes[index], 0),
    group: null,
  };
}

/** Edges between dots; those of groups are sums. */
function joinsOf(circuit, items) {
  const home = new Map(items.flatMap((one) => one.places.map((place) => [place, one.id])));
  if (!grouped()) {
    return edgesOf(circuit).map((edge, rank) => ({
      ...edge, id: `${circuit}/${edge.place}`, from: home.get(edge.source), to: home.get(edge.target), rank, count: 1,
    }));
  }
  const sums = new Map();
  for (const edge of shownEdges(circuit)) {
    const [from, to] = [home.get(edge.source), home.get(edge.target)];
    const id = `${from}>${to}`;
    const sum = sums.get(id) ?? { id, from, to, rank: 0, count: 0, size: 0, weight: 0, effect: 0 };
    sum.count += 1;
    sum.size += Math.abs(edge.weight);
    sum.weight += edge.weight;
    sum.effect += edge.effect;
    sums.set(id, sum);
  }
  return [...sums.values()];
}

/** Writes and later reads of one channel of the residual stream, drawn though they are no edges. */
function streamsOf(circuit, items) {
  if (grouped()) return [];
  const writes = items.filter((one) => one.kept && (one.row === 4 || one.row === 7));
  const reads = items.filter((one) => one.kept && (one.row === 0 || one.row === 5));
  const channel = (one) => page.circuits[circuit].nodes[one.places[0]].channel;
  const time = (one) => one.layer * ROWS.length + one.row;
  const byChannel = new Map();
  for (const read of reads) {
    const key = channel(read);
    byChannel.set(key, [...(byChannel.get(key) ?? []), read]);
  }
  return writes.flatMap((write) =>
    (byChannel.get(channel(write)) ?? [])
      .filter((read) => time(read) > time(write))
      .map((read) => ({ id: `${write.id}~${read.id}`, from: write.id, to: read.id })),
  );
}

/** Bridge correspondences between the two circuits that are shown; `words` is what a search looks in. */
function linksShown(items) {
  const [a, b] = sides();
  const home = new Map(items.flatMap((one) => one.places.map((place) => [`${one.circuit}:${place}`, one])));
  const found = new Map();
  for (const link of page.links) {
    const turned = link.left === b && link.right === a;
    if (!turned && !(link.left === a && link.right === b)) continue;
    for (const [mine, other, value] of link.pairs) {
      const ends = [home.get(`${link.left}:${mine}`), home.get(`${link.right}:${other}`)];
      if (!ends[0]?.kept || !ends[1]?.kept) continue;
      const id = `${ends[0].id}=${ends[1].id}/${link.kind}`;
      const words = [nodeWords(link.left, mine), nodeWords(link.right, other), `bridge ${link.kind}`.toLowerCase()];
      // Of dots that stand for several nodes one line stands for several links.
      const before = found.get(id)?.words ?? [];
      found.set(id, { id, from: ends[0].id, to: ends[1].id, value, kind: link.kind, words: [...before, ...words] });
    }
  }
  return [...found.values()];
}

/** What a search looks in for a node: its name, its head, its label, the tokens of its description. */
function nodeWords(circuit, place) {
  const view = page.circuits[circuit];
  const node = view.nodes[place];
  const high = (node.description?.high ?? []).map(([token]) => tokenText(view, token)).join(" ");
  return `${node.name} ${groupOf(node)} ${view.labels[node.name] ?? ""} ${high}`.toLowerCase();
}

/** Edges in and out of a node of a circuit, the strongest first. */
function edgesAt(circuit, place) {
  const edges = edgesOf(circuit);
  return {
    in: edges.filter((edge) => edge.target === place),
    out: edges.filter((edge) => edge.source === place),
  };
}
