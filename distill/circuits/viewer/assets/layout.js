// Where everything stands: columns by layer, rows by location, one block of columns for each circuit.

const PITCH = 34;
const COLUMN_GAP = 30;
const ROW_GAP = 18;
const SIDE_GAP = 90;
const LEAST_WIDTH = 3 * PITCH;
const SWEEPS = 4;

/** Positions of all dots, the cells of the grid, and what is written at its edges. */
function layout(blocks, width, height) {
  const perLine = bestPerLine(blocks, width / height);
  const lines = rowLines(blocks, perLine);
  const tops = starts(lines.map((count) => count * PITCH + ROW_GAP));
  const positions = new Map();
  const cells = [];
  const columns = [];
  let x = 0;
  blocks.forEach((block, side) => {
    const begin = x;
    const widths = columnWidths(block, lines);
    for (let layer = 0; layer < block.layers; layer += 1) {
      const columnWidth = widths[layer];
      for (let row = 0; row < ROWS.length; row += 1) {
        const box = { x, y: tops[row], width: columnWidth, height: lines[row] * PITCH, side, layer, row };
        cells.push(box);
        place(cellItems(block, layer, row), box, lines[row], positions);
      }
      columns.push({ x: x + columnWidth / 2, width: columnWidth, text: `layer ${layer}`, side });
      x += columnWidth + COLUMN_GAP;
    }
    block.middle = (begin + x - COLUMN_GAP) / 2;
    x += SIDE_GAP - COLUMN_GAP;
  });
  blocks.forEach((block) => untangle(block, positions, cells));
  const rows = ROWS.map((row, index) => ({ y: tops[index] + (lines[index] * PITCH) / 2, text: row.short }));
  return { positions, cells, columns, rows };
}

function cellItems(block, layer, row) {
  return block.items.filter((one) => one.layer === layer && one.row === row).sort((a, b) => a.order - b.order);
}

function starts(sizes) {
  let sum = 0;
  return sizes.map((size) => (sum += size) - size);
}

/** Lines of dots that each row needs, over all layers and circuits. */
function rowLines(blocks, perLine) {
  const counts = new Map();
  for (const block of blocks) {
    for (const one of block.items) {
      const key = `${one.circuit}/${one.layer}/${one.row}`;
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
  }
  const lines = ROWS.map(() => 1);
  for (const [key, count] of counts) {
    const row = Number(key.split("/")[2]);
    lines[row] = Math.max(lines[row], Math.ceil(count / perLine));
  }
  return lines;
}

/** The width that each layer needs, at least that of its heading. */
function columnWidths(block, lines) {
  const widths = new Array(block.layers).fill(LEAST_WIDTH);
  const counts = new Map();
  for (const one of block.items) {
    const key = one.layer * ROWS.length + one.row;
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  for (const [key, count] of counts) {
    const layer = Math.floor(key / ROWS.length);
    widths[layer] = Math.max(widths[layer], Math.ceil(count / lines[key % ROWS.length]) * PITCH);
  }
  return widths;
}

/** The number of dots in a line that makes the whole as wide, for its height, as the window. */
function bestPerLine(blocks, aspect) {
  let best = { gap: Infinity, perLine: 3 };
  for (let perLine = 3; perLine <= 80; perLine += 1) {
    const lines = rowLines(blocks, perLine);
    const columns = blocks.flatMap((block) => columnWidths(block, lines));
    const wide = columns.reduce((sum, width) => sum + width + COLUMN_GAP, (blocks.length - 1) * SIDE_GAP);
    const high = lines.reduce((sum, count) => sum + count * PITCH + ROW_GAP, 0);
    const gap = Math.abs(Math.log(wide / high / aspect));
    if (gap < best.gap) best = { gap, perLine };
  }
  return best.perLine;
}

/** Dots of one cell, filled column by column and centred. */
function place(items, box, lines, positions) {
  const used = Math.ceil(items.length / lines);
  const left = box.x + (box.width - used * PITCH) / 2 + PITCH / 2;
  items.forEach((one, index) => {
    const inColumn = Math.min(lines, items.length - Math.floor(index / lines) * lines);
    const top = box.y + (box.height - inColumn * PITCH) / 2 + PITCH / 2;
    positions.set(one.id, { x: left + Math.floor(index / lines) * PITCH, y: top + (index % lines) * PITCH });
  });
}

/** Orders each cell by where its neighbours stand, so that fewer edges cross; channels of a head stay together. */
function untangle(block, positions, cells) {
  const near = new Map(block.items.map((one) => [one.id, []]));
  for (const join of block.joins) {
    near.get(join.from)?.push(join.to);
    near.get(join.to)?.push(join.from);
  }
  const mine = cells.filter((box) => box.side === block.side);
  for (let sweep = 0; sweep < SWEEPS; sweep += 1) {
    for (const box of sweep % 2 ? [...mine].reverse() : mine) {
      const items = cellItems(block, box.layer, box.row);
      if (items.length > 1) place(byNeighbours(items, near, positions, block), box, box.height / PITCH, positions);
    }
  }
}

function byNeighbours(items, near, positions, block) {
  const centre = (one) => {
    const xs = near.get(one.id).map((id) => positions.get(id).x);
    return xs.length ? xs.reduce((sum, x) => sum + x, 0) / xs.length : positions.get(one.id).x;
  };
  const wish = new Map(items.map((one) => [one.id, centre(one)]));
  const heads = new Map();
  for (const one of items) {
    const head = page.circuits[block.circuit].nodes[one.places[0]].head ?? one.id;
    heads.set(head, [...(heads.get(head) ?? []), one]);
  }
  const mean = (group) => group.reduce((sum, one) => sum + wish.get(one.id), 0) / group.length;
  return [...heads.values()]
    .sort((a, b) => mean(a) - mean(b) || a[0].order - b[0].order)
    .flatMap((group) => group.sort((a, b) => wish.get(a.id) - wish.get(b.id) || a.order - b.order));
}
