// Elements and formatted values. Generated and typed text is only set as text, never parsed as HTML.

/** An element with attributes, listeners (onclick) and children: nodes or strings. */
const h = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);

function filled(node, attributes = {}, children = []) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A button that looks like a link. */
const link = (attributes, ...children) => h("button", { type: "button", class: "fk-link", ...attributes }, ...children);

/** An id that nothing else on the page has. */
function unique(name) {
  return `fk-${name}-${Math.random().toString(36).slice(2)}`;
}

/** Text with the marks of `visible` in display/page.py for invisible characters; a space is a raised dot. */
function visible(text) {
  const named = { " ": "·", "\n": "↵", "\t": "⇥", "\x7f": "␡" };
  const hidden = /[\p{Cc}\p{Cf}\p{Cs}\p{Z}\u115f\u1160\u2800\u3164\uffa0\ufe0e\ufe0f\u034f]/gu;
  const marked = text.replace(hidden, (each) => {
    const code = each.codePointAt(0);
    const unnamed = code < 0x20 ? String.fromCharCode(0x2400 + code) : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
    return named[each] ?? unnamed;
  });
  return /^\p{M}/u.test(marked) ? `◌${marked}` : marked;
}

/** A probability in percent; only 1 is "100.0%", and only 0 is "0.0%". */
function share(probability) {
  if (probability >= 0.9995 && probability < 1) return ">99.9%";
  return probability > 0 && probability < 0.001 ? "<0.1%" : `${(100 * probability).toFixed(1)}%`;
}

function bytes(count) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  const power = count < 1024 ? 0 : Math.floor(Math.log2(count) / 10);
  const value = count / 1024 ** power;
  return `${power && value < 100 ? value.toPrecision(3) : Math.round(value)} ${units[power]}`;
}
