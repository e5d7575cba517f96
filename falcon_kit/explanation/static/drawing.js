// Arrays, numbers and small drawings. Every part of a drawing has `data-info`, which its section shows on hover and focus.

/** A float32 array with its shape, from base64. */
function unpack({ shape, f32 }) {
  const bytes = Uint8Array.from(atob(f32), (letter) => letter.charCodeAt(0));
  return Object.assign(new Float32Array(bytes.buffer), { shape });
}

const svg = (tag, attributes, ...children) => filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** A number with four significant digits. */
function figure(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return (size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toPrecision(4)).replace("-", "−");
}

const count = (value) => value.toLocaleString("en");
const plural = (value, word, many = `${word}s`) => `${count(value)} ${value === 1 ? word : many}`;

/** The heading row of a table; a column of bars has no heading. */
function headings(...names) {
  return h("thead", {}, h("tr", {}, ...names.map((name) => (name ? h("th", { scope: "col" }, name) : h("td", {})))));
}

/** The index of the largest value. */
function argmax(values) {
  let best = 0;
  for (let at = 1; at < values.length; at++) if (values[at] > values[best]) best = at;
  return best;
}

/** The colour of a signed value: blue below zero, vermilion above. */
function signed(value, largest) {
  const strength = largest ? Math.sqrt(Math.abs(value) / largest) : 0;
  return `color-mix(in srgb, ${value < 0 ? "var(--fk-cold)" : "var(--fk-warm)"} ${(strength * 100).toFixed(1)}%, transparent)`;
}

/** The first components of a vector as coloured cells in a row; the arrow keys walk through them. */
function strip(name, values, total, largest = Math.max(...values.map(Math.abs))) {
  const cells = [...values].map((value, at) =>
    h("i", { style: `background:${signed(value, largest)}`, "data-info": `${name}, component ${at}: ${figure(value)}`, "data-value": value }),
  );
  const shown = values.length < total ? `the first ${values.length} of ${count(total)} components` : plural(total, "component");
  const row = h("div", { class: "fk-strip", role: "img", tabindex: "0", "aria-label": `${name}: ${shown}` }, ...cells);
  walkCells(row, cells);
  return row;
}

/** Arrow keys move through the parts of a drawing, and show the text of each. */
function walkCells(node, cells) {
  let at = -1;
  node.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    cells[at]?.classList.remove("fk-at");
    at = Math.max(0, Math.min(cells.length - 1, at + step));
    cells[at].classList.add("fk-at");
    showInfo(cells[at]);
    event.preventDefault();
  });
  node.addEventListener("blur", () => cells[at]?.classList.remove("fk-at"));
}

/** A vector with its name, its strip and its statistics. */
function vectorRow(name, vector, total, largest) {
  const values = unpack(vector.first);
  const facts = `mean ${figure(vector.mean)}, standard deviation ${figure(vector.deviation)}, norm ${figure(vector.norm)}`;
  const heading = h("p", {}, h("span", { class: "fk-name" }, name), h("span", { class: "fk-note" }, facts));
  return h("div", { class: "fk-vector" }, heading, strip(name, values, total, largest));
}

/** A horizontal bar of a share from 0 to 1. */
function bar(value, kind = "") {
  const width = 100 * Math.max(0, Math.min(1, value));
  return h("span", { class: `fk-bar ${kind}`, "aria-hidden": "true" }, h("i", { style: `width:${width.toFixed(2)}%` }));
}

/** The cells of a table: its row's name, a number with its exact value, and a bar. */
const rowName = (...name) => h("th", { scope: "row" }, ...name);
const numberCell = (value, written = figure(value)) => h("td", { "data-value": value }, written);
const barCell = (value, kind) => h("td", {}, bar(value, kind));

/** Shows the text of a part of a drawing in the line below its section. */
function showInfo(part) {
  const section = part.closest(".fk-stage");
  const line = section?.querySelector(".fk-info");
  const text = part.dataset.info ?? line?.dataset.usual;
  if (line && line.textContent !== text) line.textContent = text; // the same text is not read out again
}

/** A token as text: invisible characters are visible, and its direction is isolated. */
function tokenText(text) {
  return h("bdi", {}, visible(text) || "∅");
}

/** A section of the view: heading, drawing, a sentence that says what it shows, and a line of shape, formula and code. */
function stage(name, title) {
  const body = h("div", { class: "fk-body" });
  const sentence = h("p", { class: "fk-sentence" });
  const info = h("p", { class: "fk-info", "aria-live": "polite" });
  const heading = h("h3", { tabindex: "-1" }, title);
  const node = h("section", { class: "fk-stage", "data-stage": name, "aria-label": title }, heading, body, sentence, info);
  const show = (drawing, text, usual) => {
    const same = drawing.length === body.children.length && drawing.every((each, at) => each === body.children[at]);
    if (!same) body.replaceChildren(...drawing); // a node that was put back would be scrolled to its start
    sentence.replaceChildren(...[text].flat());
    info.dataset.usual = usual;
    showInfo(body);
  };
  /** Runs a change of the drawing. The focus stays in its place, although the control there may be a new one. */
  const keepFocus = (change) => {
    const places = () => [...body.querySelectorAll("button:enabled, input, [tabindex='0']")];
    const at = places().indexOf(body.getRootNode().activeElement);
    change();
    if (at >= 0) (places()[at] ?? heading).focus({ preventScroll: true });
  };
  const focus = () => {
    node.scrollIntoView({ block: "nearest", behavior: "auto" });
    heading.focus({ preventScroll: true });
  };
  const point = ({ target }) => showInfo(target.closest("[data-info]") ?? body);
  for (const event of ["mouseover", "focusin"]) node.addEventListener(event, point);
  for (const event of ["mouseleave", "focusout"]) node.addEventListener(event, () => showInfo(body));
  return { name, title, node, body, show, keepFocus, focus };
}
