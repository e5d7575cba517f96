// Elements and formatted values. Generated and typed text is only set as text, never parsed as HTML.

/** An element with attributes, listeners (onclick) and children: nodes or strings. */
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An id that no other playground on the page has. */
function unique(name) {
  return `fk-${name}-${Math.random().toString(36).slice(2)}`;
}

/** A row of buttons of which one is pressed: {value: [label, help]}. */
function segments(label, choices, choose) {
  const buttons = Object.entries(choices).map(([value, [text, help]]) =>
    h("button", { type: "button", title: help, "aria-pressed": "false", "data-value": value, onclick: () => choose(value) }, text),
  );
  const node = h("div", { class: "fk-segments", role: "group", "aria-label": label }, ...buttons);
  const show = (value) => buttons.forEach((each) => each.setAttribute("aria-pressed", String(each.dataset.value === value)));
  const enable = (enabled) => buttons.forEach((each) => (each.disabled = !enabled));
  return { node, show, enable };
}

/** A function that sets a field's value, unless the user has typed something that is not sent yet. */
function setter(input) {
  let typing = false;
  input.addEventListener("input", () => (typing = true));
  for (const end of ["change", "blur"]) input.addEventListener(end, () => (typing = false));
  return (value) => typing || (input.value = value);
}

/** Replaces invisible characters by symbols: spaces, line ends, control characters, bidirectional marks. */
function visible(text) {
  const named = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  const hidden = /[ \n\t\r]|[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\uFFF9-\uFFFB]/gu;
  return text.replace(hidden, (each) => named[each] ?? `⟨U+${each.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function percent(logprob) {
  const value = Math.exp(logprob) * 100;
  return value >= 0.1 ? `${value.toFixed(1)}%` : "<0.1%";
}

function milliseconds(seconds) {
  return seconds < 10 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

function bytes(count) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  const power = count < 1024 ? 0 : Math.floor(Math.log2(count) / 10);
  const value = count / 1024 ** power;
  return `${power && value < 100 ? value.toPrecision(3) : Math.round(value)} ${units[power]}`;
}

async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page without HTTPS has no clipboard API: select the text, so that Ctrl+C copies it.
    getSelection().selectAllChildren(node);
    return document.execCommand("copy");
  }
  return true;
}
