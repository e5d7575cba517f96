// The column beside the text: settings and history.

const FIELDS = [
  { name: "temperature", label: "Temperature", unit: "", min: 0, max: 2, step: 0.05, off: 1, slider: true,
    help: "Sharper below 1, flatter above." },
  { name: "top_k", label: "Top-k", unit: "tokens", min: 0, max: 1000, step: 1, off: 0,
    help: "Only the k most probable tokens; 0 for all." },
  { name: "top_p", label: "Top-p", unit: "probability", min: 0.01, max: 1, step: 0.01, off: 1,
    help: "Only the fewest most probable tokens whose probabilities add up to p." },
  { name: "max_new_tokens", label: "Length", unit: "tokens", min: 1, max: 100000, step: 1, off: 200,
    help: "The maximum number of new tokens." },
];

const PRESETS = {
  card: ["Card", "As in the model card: sample from the ten most probable tokens"],
  greedy: ["Greedy", "Always the most probable token"],
  precise: ["Precise", "Little randomness"],
  creative: ["Creative", "Much randomness"],
};

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

/** What a number field contains: null for nothing; what the browser cannot read as a number is refused by the kernel. */
function typedNumber(input) {
  if (input.validity.badInput) return "no number";
  return input.value === "" ? null : Number(input.value);
}

/** A number with its unit and a line of help. */
function numberField(field, change) {
  const [id, help] = [unique(field.name), unique("help")];
  const attributes = { min: field.min, max: field.max, step: field.step, "aria-describedby": help };
  const input = h("input", { ...attributes, type: "number", id, "data-setting": field.name });
  const slider = field.slider ? h("input", { ...attributes, type: "range", "aria-label": `${field.label}, slider` }) : null;
  const send = (value) => change({ [field.name]: value === null || value === field.off ? unset(field) : value });
  input.addEventListener("change", () => send(typedNumber(input)));
  slider?.addEventListener("input", () => (input.value = slider.value));
  slider?.addEventListener("change", () => send(Number(slider.value)));
  const label = h("label", { for: id }, field.label);
  const row = h("div", { class: "fk-row" }, label, input, h("span", { class: "fk-unit" }, field.unit));
  const node = h("div", { class: "fk-field" }, row, slider, h("div", { class: "fk-help", id: help }, field.help));
  const [set, slide] = [setter(input), slider && setter(slider)];
  const show = (value) => {
    set(value ?? field.off);
    slide?.(input.value);
  };
  return { node, show };
}

/** The Python value for "off": None, except for settings that always have a value. */
function unset(field) {
  return field.name === "temperature" || field.name === "max_new_tokens" ? field.off : null;
}

/** Stop strings, one per line; \n stands for a line end inside one. */
function stopField(change) {
  const [id, help] = [unique("stop"), unique("help")];
  const input = h("textarea", { id, rows: "2", spellcheck: "false", dir: "auto", "data-setting": "stop", "aria-describedby": help });
  const read = () => input.value.split("\n").filter((line) => line !== "").map((line) => line.replaceAll("\\n", "\n"));
  input.addEventListener("change", () => change({ stop: read() }));
  const hint = h("div", { class: "fk-help", id: help }, "One per line; \\n stands for a line end.");
  const node = h("div", { class: "fk-field" }, h("label", { for: id }, "Stop at"), input, hint);
  const set = setter(input);
  const show = (stop) => set(stop.map((each) => each.replaceAll("\n", "\\n")).join("\n"));
  return { node, show };
}

function seedField(change) {
  const [id, help] = [unique("seed"), unique("help")];
  const input = h("input", { type: "number", id, min: 0, step: 1, placeholder: "random", "data-setting": "seed", "aria-describedby": help });
  input.addEventListener("change", () => change({ seed: typedNumber(input) }));
  const free = link({ onclick: () => (change({ seed: null }), input.focus()) }, "random"); // the link goes
  const row = h("div", { class: "fk-row" }, h("label", { for: id }, "Seed"), input, free);
  const hint = h("div", { class: "fk-help", id: help }, "Same seed, same settings, same text.");
  const set = setter(input);
  const show = (seed) => {
    set(seed ?? "");
    free.hidden = seed === null;
  };
  return { node: h("div", { class: "fk-field" }, row, hint), show };
}

/** The system message of every conversation. */
function systemField(act) {
  const id = unique("system");
  const input = h("textarea", { id, rows: "2", placeholder: "none", dir: "auto" });
  input.addEventListener("change", () => act("system", { text: input.value }));
  const node = h("div", { class: "fk-field" }, h("label", { for: id }, "System message"), input);
  return { node, show: setter(input) };
}

function settingsView(act) {
  const change = (changes) => act("set", { changes });
  const presets = segments("Presets", PRESETS, (name) => act("preset", { name }));
  const numbers = FIELDS.map((field) => numberField(field, change));
  const [stop, seed, system] = [stopField(change), seedField(change), systemField(act)];
  const parts = [presets, ...numbers, seed, stop, system].map((each) => each.node);
  const node = h("section", { class: "fk-settings", "aria-label": "Settings" }, h("h3", {}, "Settings"), ...parts);

  function show(state) {
    presets.show(state.preset);
    FIELDS.forEach((field, number) => numbers[number].show(state.settings[field.name]));
    stop.show(state.settings.stop);
    seed.show(state.settings.seed);
    system.show(state.system);
    system.node.hidden = state.mode !== "chat";
  }
  return { node, show };
}

/** The earlier turns, newest first, and the file to save them in. */
function historyView(act) {
  const list = h("ol", { class: "fk-history", "aria-label": "Earlier turns" });
  const path = h("input", { type: "text", value: "session.json", "aria-label": "File, on the machine of the kernel", spellcheck: "false" });
  const button = (label, command, title) =>
    h("button", { type: "button", title, onclick: () => act(command, { path: path.value }) }, label);
  const files = h("div", { class: "fk-row" }, path, button("Save", "save", "Write all turns into the file"), button("Load", "load", "Add the turns of the file"));
  const node = h("section", { "aria-label": "History" }, h("h3", {}, "History"), list, files);

  function show(turns) {
    const entry = ({ id, title, note }) => {
      const open = h("button", { type: "button", title, "data-id": id, onclick: () => act("open", { id }) }, h("span", {}, title), h("span", {}, note));
      return h("li", {}, open);
    };
    const focused = list.getRootNode().activeElement?.dataset.id;
    list.replaceChildren(...turns.map(entry));
    [...list.querySelectorAll("button")].find((each) => each.dataset.id === focused)?.focus({ preventScroll: true });
  }
  return { node, show };
}
