// Puts the page together.

function onSelect(item) {
  if (!item) choose(null, false);
  else if (item.group) choose(item);
  else choose({ circuit: item.circuit, place: item.places[0] });
}

/** A node in the address, page.html#1.attn.q.12, is chosen from the start. */
function chooseNamed() {
  const name = decodeURIComponent(location.hash.slice(1));
  for (const circuit of name ? sides() : []) {
    const place = page.circuits[circuit].nodes.findIndex((node) => node.name === name);
    if (place >= 0) return choose({ circuit, place });
  }
}

startGraph(onSelect);
drawSelects();
drawExports();
startSearch();
drawControls();
rebuild();
drawPanel();
chooseNamed();
window.addEventListener("hashchange", chooseNamed);
window.addEventListener("resize", () => rebuild());
window.circuitPage = { page, state, graph, choose, visibleGraph, ready: true };
