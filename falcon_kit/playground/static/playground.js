// The playground's view. It holds no state of its own: it asks the kernel at the start, and shows what the kernel says.

function render({ model, el }) {
  const root = h("div", { class: "fk-playground", "data-lm-suppress-shortcuts": "true" });
  const act = (command, values = {}) => model.send({ do: command, ...values });
  const turns = new Map(); // every turn the kernel told of, by id
  let running = null;
  let greeting = null; // until the kernel has answered
  let offered = {}; // examples: {title: [mode, text]}
  let lastDraft = ""; // what the kernel knows of the text field

  // Above: the models, the mode, the odds.
  const title = h("h2", {});
  const modes = segments("Mode", { prompt: ["Prompt", "Continue a text as it stands"], chat: ["Chat", "Answer messages"] }, (mode) => act("mode", { mode }));
  const odds = h("input", { type: "checkbox", id: unique("odds"), onchange: () => act("odds", { shown: odds.checked }) });
  const legend = h("span", { class: "fk-legend", "aria-hidden": "true" }, "likely", ...[0, 1, 2, 3, 4, 5].map((level) => h("i", { class: `fk-p${level}` })), "unlikely");
  const oddsLabel = h("label", { class: "fk-switch", for: odds.id, title: "Tint each token by its probability; hover, or use the arrow keys, for what else was likely" }, odds, "Token odds", legend);
  const fold = h("button", { type: "button", class: "fk-fold", "aria-expanded": "false" }, "Settings and history");
  const head = h("header", {}, title, modes.node, oddsLabel, fold);

  // In the middle: what was written.
  const empty = h("p", { class: "fk-empty" }, "Nothing written yet. Choose an example or type, then press Ctrl+Enter.");
  const log = h("div", { class: "fk-log", role: "log", "aria-live": "off", "aria-label": "Text", tabindex: "0" }, empty);
  const notice = h("div", { class: "fk-notice", role: "alert", hidden: true });

  // Below: the text field and its buttons.
  const field = h("textarea", { id: unique("text"), rows: "4", spellcheck: "false" });
  const fieldLabel = h("label", { for: field.id });
  const examples = h("select", { "aria-label": "Examples" });
  const button = (label, title, onclick, keys) => h("button", { type: "button", title, onclick }, label, keys ? h("kbd", { "aria-hidden": "true" }, keys) : null);
  const generate = () => {
    const typing = root.getRootNode().activeElement;
    if (settings.node.contains(typing)) (typing.blur(), typing.focus()); // sends what was typed there
    clearTimeout(waiting);
    act("generate", { text: (lastDraft = field.value) });
    if (!running && modes.now === "chat") setDraft("");
  };
  const go = button("Generate", "Write (Ctrl+Enter)", generate, "Ctrl ↵");
  go.classList.add("fk-go");
  const stop = button("Stop", "Stop writing (Esc)", () => act("stop"), "Esc");
  const again = button("Regenerate", "Write the last answer again", () => act("regenerate"));
  const undo = button("Undo", "Take the last step back", () => act("undo"));
  const clear = button("Clear", "Begin anew; the history keeps what was written", () => act("clear"));
  const status = h("span", { class: "fk-status", role: "status" });
  const meter = h("meter", { "aria-label": "Context used", min: "0" });
  const meterText = h("span", { class: "fk-facts" });
  const composer = h(
    "section",
    { class: "fk-composer", "aria-label": "Write" },
    h("div", { class: "fk-row" }, fieldLabel, examples),
    field,
    h("div", { class: "fk-row fk-buttons" }, go, stop, again, undo, clear, status),
    h("div", { class: "fk-row fk-context" }, meter, meterText),
  );

  const settings = settingsView(act);
  const history = historyView(act);
  const side = h("aside", { id: unique("side") }, settings.node, history.node);
  const card = oddsCard(root);
  fold.setAttribute("aria-controls", side.id);
  fold.addEventListener("click", () => fold.setAttribute("aria-expanded", String(root.classList.toggle("fk-open"))));
  root.append(head, h("div", { class: "fk-columns" }, h("main", {}, log, notice, composer), side), card.node);
  el.append(root);

  function setDraft(text) {
    field.value = lastDraft = text;
  }

  function showMeter({ used, context, cache_bytes: kept }) {
    meter.hidden = used === null || context === null;
    if (!meter.hidden) Object.assign(meter, { max: context, value: used, low: context * 0.75, high: context * 0.9, optimum: 0 });
    const parts = [
      used === null ? "context: counted by the endpoint" : `context: ${used}${context === null ? "" : ` of ${context}`} tokens`,
      kept !== null && `${bytes(kept)} of keys and values`,
    ];
    meterText.textContent = parts.filter(Boolean).join(" · ");
  }

  /** Does something that makes the text longer, and stays at its end if that is where the reader is. */
  function following(change) {
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    change();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  const received = {
    start({ lanes, examples: known }) {
      clearTimeout(greeting);
      title.textContent = lanes.join(" beside ");
      root.classList.toggle("fk-two", lanes.length > 1);
      const heading = h("option", { value: "" }, "Examples …");
      offered = known;
      examples.replaceChildren(heading, ...Object.keys(known).map((each) => h("option", { value: each }, each)));
    },
    turn({ turn }) {
      const old = turns.get(turn.id);
      const view = turnView(turn, act);
      turns.set(turn.id, view);
      old?.node.replaceWith(view.node);
    },
    state(state) {
      running = state.running;
      modes.show((modes.now = state.mode));
      modes.enable(!running);
      odds.checked = state.odds;
      root.classList.toggle("fk-odds", state.odds);
      settings.show(state);
      fieldLabel.textContent = state.mode === "chat" ? "Message" : "Prompt";
      go.firstChild.data = state.mode === "chat" ? "Send" : "Generate";
      if (state.draft !== lastDraft) setDraft(state.draft);
      [go.disabled, stop.disabled, clear.disabled] = [Boolean(running), !running, Boolean(running) || !state.turns.length];
      [again.disabled, undo.disabled] = [clear.disabled, Boolean(running) || !state.can_undo];
      status.textContent = running ? "Writing …" : "";
      notice.textContent = state.notice.text;
      notice.className = `fk-notice fk-${state.notice.kind}`;
      notice.hidden = !state.notice.text;
      if (state.turns.some((id) => !turns.has(id))) return act("hello");
      const shown = state.turns.map((id) => turns.get(id).node);
      const same = shown.length === log.children.length && shown.every((node, number) => node === log.children[number]);
      if (!same) following(() => log.replaceChildren(...(shown.length ? shown : [empty])));
      showMeter(state.meter);
    },
    delta({ id, answers, meter: used }) {
      const turn = turns.get(id);
      let whole = Boolean(turn);
      following(() => {
        answers.forEach((answer, number) => {
          whole = whole && turn.answers[number].grow(answer.at, answer.spans);
          turn?.answers[number].update(answer);
        });
      });
      showMeter(used);
      if (!whole) act("hello");
    },
    silence() {
      notice.textContent = "The kernel does not answer. When no cell is running any more, reload the page.";
      notice.className = "fk-notice fk-error";
      notice.hidden = false;
    },
    meter: ({ meter: used }) => showMeter(used),
    history: ({ turns: earlier }) => history.show(earlier),
    code: ({ id, code }) => turns.get(id)?.showCode(code),
  };
  const listen = (message) => received[message.type]?.(message);
  model.on("msg:custom", listen);

  let waiting = null;
  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => act("draft", { text: (lastDraft = field.value) }), 250);
  });
  examples.addEventListener("change", () => {
    const title = examples.value;
    act("example", { title });
    setDraft(offered[title][1]);
    examples.value = "";
    field.focus();
  });
  root.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
    else if (event.key === "Escape") (card.hide(), running && act("stop"));
    else return event.stopPropagation(); // the notebook has shortcuts of its own
    event.stopPropagation();
    event.preventDefault();
  });

  /** The token under the pointer or the focus shows its odds. */
  function point(event) {
    const token = event.target.closest?.(".fk-token");
    if (token && root.classList.contains("fk-odds")) card.show(token);
    else if (!card.node.contains(event.target)) card.hide();
  }
  root.addEventListener("mouseover", point);
  root.addEventListener("focusin", point);
  root.addEventListener("mouseleave", card.hide);

  // A page that is reloaded may not have its line to the kernel yet: say hello until somebody answers. Now and then
  // JupyterLab 4.6 sends a reloaded page's messages to a subshell that ipykernel has ended; another reload mends it.
  const greet = (times) => {
    act("hello");
    if (times === 3) received.silence();
    greeting = setTimeout(greet, 2000, times + 1);
  };
  greet(0);
  return () => {
    clearTimeout(waiting);
    clearTimeout(greeting);
    model.off("msg:custom", listen);
  };
}

export default { render };
