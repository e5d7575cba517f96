// The view: it asks the model for parts, in the kernel or stored in the page, and draws the stages from them.

const NO_ANSWER = 5000; // milliseconds after which a missing answer is reported
const HELLO_AGAIN = 2000; // milliseconds after which "hello" is sent again
const SILENT = "No answer from the kernel. If it was restarted, run the cell again. If no cell is running, reload the page.";
const NOT_STORED = "This page has no kernel and does not hold this part: run fk.explain in a notebook.";

/** The parts that are stored in a page, behind the interface of a widget's model. */
function storedModel(data) {
  let listener = null;
  const answer = (message) => setTimeout(() => listener?.(message), 0);
  return {
    routed: Boolean(data.route),
    stored: [...new Set(Object.keys(data.parts).map((key) => +key.split(" ")[1]))].sort((a, b) => a - b),
    on: (event, run) => (listener = run),
    off: () => (listener = null),
    send({ do: command, key }) {
      const part = command === "route" ? data.route : data.parts[key];
      if (command === "hello") answer({ type: "start", ...data.start });
      else answer(part ? { type: "part", key, part } : { type: "error", key, text: NOT_STORED });
    },
  };
}

function render({ model, el }) {
  const state = { layer: 0, head: 0, position: 0, attended: null };
  const parts = new Map(); // what was received, by request
  const waiting = new Map(); // {promise, resolve, reject, late, send} of what was asked for, by request
  let text = null;
  let helloTimer = null;
  let drawn = { ...state }; // what is on the screen
  let drawing = 0; // the number of the drawing that is newest

  const notice = h("div", { class: "fk-notice", role: "alert", hidden: true });
  const act = { state, choose, take, ask, reachable, isNewest: (shown) => shown === text };
  const stages = [tokensStage(act), embeddingStage(), normsStage(), projectionStage(act), rotaryStage(), attentionStage(act), mlpStage(), residualStage(), predictionStage(act), routeStage(act), cacheStage()];
  const diagram = flow(stages);
  const guide = tour(stages, diagram.node);
  const selects = ["layer", "head"].map((name) => {
    const select = h("select", { id: unique(name), onchange: () => choose({ [name]: +select.value }) });
    return { name, select, label: h("label", { for: select.id }, name[0].toUpperCase() + name.slice(1), " ", select) };
  });
  const title = h("h2", {}, "…");
  const head = h("div", { class: "fk-row" }, title, ...selects.map((each) => each.label), guide.start);
  const root = h("div", { class: "fk-widget fk-explanation", "data-lm-suppress-shortcuts": "true" }, head, notice, diagram.node, guide.card, h("div", { class: "fk-stages" }, ...stages.map((each) => each.node)));
  root.classList.add("fk-empty");
  el.querySelector(".fk-summary")?.remove(); // what is shown without JavaScript
  el.append(root);

  function say(message) {
    notice.textContent = message;
    notice.hidden = !message;
  }

  /** Whether a token can be shown in a layer: a page without a kernel holds some layers, at the last token. */
  function reachable({ layer, position }) {
    return !model.stored || (model.stored.includes(layer) && position === text.tokens.length - 1);
  }

  /** The part that answers a request, from the model or from an earlier answer. An error is shown, and rejects. */
  function ask(command, values = {}) {
    const key = [command, ...Object.values(values)].join(" ");
    if (parts.has(key)) return Promise.resolve(parts.get(key));
    if (waiting.has(key)) return waiting.get(key).promise;
    return request(command, key, Object.fromEntries(Object.entries(values).filter(([, value]) => value !== "")));
  }

  /** Sends a request. The promise waits for its answer; one that does not come in time is reported. */
  function request(command, key, values) {
    clearTimeout(waiting.get(key)?.late);
    const send = () => {
      try {
        model.send({ do: command, key, ...values });
      } catch {
        say(SILENT); // the kernel was restarted
      }
    };
    const asked = { send, late: setTimeout(() => say(SILENT), NO_ANSWER) };
    asked.promise = new Promise((resolve, reject) => Object.assign(asked, { resolve, reject }));
    waiting.set(key, asked);
    send();
    return asked.promise;
  }

  function choose(changes) {
    if (!("attended" in changes)) state.attended = null; // the earlier token that this head attends to most
    Object.assign(state, changes);
    return update();
  }

  function take(id) {
    if (!waiting.has("start")) request("take", "start", { id }).catch(() => {}); // the view shows an error itself
  }

  async function update() {
    const number = ++drawing;
    const { layer, position, head: at, attended } = state;
    const asked = [ask("layer", { layer, position }), ask("head", { layer, position, head: at, attended: attended ?? "" })];
    const [layerPart, headPart] = await Promise.all(asked).catch(() => []);
    if (number !== drawing) return; // something else was chosen meanwhile
    if (headPart) drawn = { ...state };
    Object.assign(state, drawn); // after an error, what was chosen before
    selects.forEach(({ name, select }) => (select.value = state[name]));
    if (!headPart) return;
    const now = { text, state, layer: layerPart, head: headPart, fixed: Boolean(model.stored), routed: !model.stored || model.routed };
    for (const each of stages) each.keepFocus(() => each.update(now));
    root.classList.remove("fk-empty");
    root.dataset.drawn = number;
  }

  function options(select, numbers, total) {
    select.replaceChildren(...numbers.map((at) => h("option", { value: at }, `${at} of 0 to ${total - 1}`)));
  }

  /** Draws what stays the same for every text. */
  function begin({ text, layer, head }) {
    const { layers, query_heads: heads } = text.spec;
    options(selects[0].select, model.stored ?? [...Array(layers).keys()], layers);
    options(selects[1].select, [...Array(heads).keys()], heads);
    Object.assign(state, { layer, head });
    diagram.update(text);
    guide.update(text);
    title.textContent = `${text.model}, from a text to the next token`;
  }

  function start(message) {
    if (text === null) begin(message);
    text = message.text;
    parts.clear();
    say("");
    choose({ position: text.tokens.length - 1 });
  }

  function receive(message) {
    const { type, key = "start", tokens } = message; // a new text has no key
    const asked = waiting.get(key);
    if (tokens < text?.tokens.length) return asked?.send(); // of the text before: what waits is asked for again
    clearTimeout(asked?.late);
    waiting.delete(key);
    if (key === "hello" || type === "start") clearTimeout(helloTimer);
    if (type === "start" && !(key === "hello" && text)) start(message); // "hello" may be answered more than once
    if (type === "error") {
      say(message.text);
      asked?.reject(new Error(message.text));
    }
    if (type !== "part") return;
    if (notice.textContent === SILENT) say("");
    parts.set(key, message.part);
    asked?.resolve(message.part);
  }

  // A reloaded page may not be connected to the kernel yet.
  function sayHello(times) {
    if (times === 3) say(SILENT);
    helloTimer = setTimeout(sayHello, HELLO_AGAIN, times + 1);
    model.send({ do: "hello", key: "hello" });
  }

  model.on("msg:custom", receive);
  sayHello(0);
  return () => {
    clearTimeout(helloTimer);
    model.off("msg:custom", receive);
  };
}
