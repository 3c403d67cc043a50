// The payload, and small things that every part of the page uses. All text goes into the page as text nodes.

const page = JSON.parse(document.getElementById("payload").textContent);

const ROWS = [
  { kind: "attn.act_in", short: "attention\nreads", words: "read of the attention" },
  { kind: "attn.q", short: "q", words: "query channel" },
  { kind: "attn.k", short: "k", words: "key channel" },
  { kind: "attn.v", short: "v", words: "value channel" },
  { kind: "attn.resid_delta", short: "attention\nwrites", words: "write of the attention" },
  { kind: "mlp.act_in", short: "MLP\nreads", words: "read of the MLP" },
  { kind: "mlp.post_act", short: "neurons", words: "neuron" },
  { kind: "mlp.resid_delta", short: "MLP\nwrites", words: "write of the MLP" },
];
const ROW_OF = Object.fromEntries(ROWS.map((row, index) => [row.kind, index]));
const UP = "#2f6db5";
const DOWN = "#d2691e";
const BRIDGE = "#7d4fb8";

/** An element with attributes, listeners (onclick: function) and children; strings become text. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat(3).filter((child) => child !== null && child !== undefined));
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

/** A number for people: three digits, a real minus sign, "-" for none. */
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en-US").replace("-", "−");
  const size = Math.abs(value);
  if (size < 1e-9) return "0";
  return (size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)))).replace("-", "−");
}

/** The same with a sign, in the colour of the sign. */
function signed(value) {
  const text = value > 0 ? `+${number(value)}` : number(value);
  return el("span", { class: value > 0 ? "up" : value < 0 ? "down" : "" }, text);
}

function tokenText(view, place) {
  return view.tokens[place];
}

/** A token's text with its spaces and line ends to be seen. */
function visibleText(text) {
  return text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}
