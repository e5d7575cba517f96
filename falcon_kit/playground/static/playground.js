// The playground's view. It stores no state: it requests the state from the kernel at the start, and shows updates.

const NO_ANSWER = 5000; // milliseconds after which a missing answer is reported

function render({ model, el }) {
  const root = h("div", { class: "fk-widget fk-playground", "data-lm-suppress-shortcuts": "true" });
  const act = (command, values = {}) => {
    if (draftTimer) sendDraft(); // what was typed comes first
    late ??= command === "hello" ? null : setTimeout(silence, NO_ANSWER);
    try {
      model.send({ do: command, ...values });
    } catch {
      silence(); // the kernel was restarted
    }
  };
  /** Asks for an answer of the model, unless one is asked for already: a second click would be refused. */
  const ask = (command, values) => {
    if (asked) return;
    asked = true;
    act(command, values);
  };
  const turns = new Map(); // every turn that the kernel sent, by id
  let running = null;
  let helloTimer = null; // until the kernel has answered
  let late = null; // until it has answered a command
  let silent = false; // the notice says that it has not
  let asked = false; // for an answer of the model, which has not begun
  let sent = null; // a message that was taken out of the text field, until the kernel has answered
  let draftTimer = null; // until what is typed is sent
  let examplesByTitle = {}; // {title: [mode, text]}
  let lastDraft = ""; // the kernel's copy of the text field
  let unheard = 0; // copies on their way: until the kernel has them, what it says of the field is older than the field

  // The header: models, mode, token probabilities, guardrails.
  const title = h("h2", {});
  const modes = segments("Mode", { prompt: ["Prompt", "Continue a text as it stands"], chat: ["Chat", "Answer messages"] }, (mode) => act("mode", { mode }));
  const probabilities = h("input", { type: "checkbox", id: unique("probabilities"), onchange: () => act("token_probabilities", { shown: probabilities.checked }) });
  const legend = h("span", { class: "fk-legend", "aria-hidden": "true" }, "likely", ...[0, 1, 2, 3, 4, 5].map((level) => h("i", { class: `fk-p${level}` })), "unlikely");
  const probabilitiesLabel = h("label", { class: "fk-switch", for: probabilities.id, title: "Tint each token by its probability; hover, or use the arrow keys, for the most probable tokens" }, probabilities, "Token probabilities", legend);
  const guarded = h("input", { type: "checkbox", role: "switch", id: unique("guardrails"), onchange: () => act("guard", { on: guarded.checked }) });
  const guardedLabel = h("label", { class: "fk-switch", for: guarded.id, title: "Check each prompt before the model reads it, and each answer before it is shown" }, guarded, "Guardrails");
  const fold = h("button", { type: "button", class: "fk-fold", "aria-expanded": "false" }, "Settings and history");
  const head = h("div", { class: "fk-head" }, title, modes.node, probabilitiesLabel, guardedLabel, fold);

  // The text.
  const empty = h("p", { class: "fk-empty" }, "No text yet. Choose an example or type a prompt, then press Ctrl+Enter.");
  const log = h("div", { class: "fk-log", role: "log", "aria-live": "off", "aria-label": "Text", tabindex: "0" }, empty);
  const notice = h("div", { class: "fk-notice", role: "alert", hidden: true });

  // The text field and its buttons.
  const field = h("textarea", { id: unique("text"), rows: "4", spellcheck: "false", dir: "auto" });
  const fieldLabel = h("label", { for: field.id });
  const examples = h("select", { "aria-label": "Examples" });
  const button = (label, title, onclick, keys) => h("button", { type: "button", title, onclick }, label, keys ? h("kbd", { "aria-hidden": "true" }, keys) : null);
  const generate = () => {
    const focused = root.getRootNode().activeElement;
    if (settings.node.contains(focused)) (focused.blur(), focused.focus()); // sends a setting that was typed
    if (asked) return;
    sendDraft(); // if the kernel refuses the text, it sends back its draft
    sent = modes.now === "chat" && !running ? field.value : null;
    ask("generate", { text: field.value });
    if (sent !== null && asked) setDraft("");
  };
  const go = button("Generate", "Generate (Ctrl+Enter)", generate, "Ctrl ↵");
  go.classList.add("fk-go");
  const stop = button("Stop", "Stop generating (Esc)", () => act("stop"), "Esc");
  const again = button("Regenerate", "Generate the last answer again", () => ask("regenerate"));
  const undo = button("Undo", "Undo the last step", () => act("undo"));
  const clear = button("Clear", "Clear the conversation; the history stays", () => act("clear"));
  const status = h("span", { class: "fk-status", role: "status" });
  const meter = h("meter", { "aria-label": "Context used", min: "0" });
  const meterText = h("span", { class: "fk-facts" });
  const composer = h(
    "section",
    { class: "fk-composer", "aria-label": "Write" },
    h("div", { class: "fk-row" }, fieldLabel, examples),
    field,
    h("div", { class: "fk-row" }, go, stop, again, undo, clear, status),
    h("div", { class: "fk-row fk-context" }, meter, meterText),
  );

  const settings = settingsView(act);
  const history = historyView(act);
  const side = h("div", { class: "fk-side", id: unique("side") }, settings.node, history.node);
  const card = probabilityCard(root);
  fold.setAttribute("aria-controls", side.id);
  fold.addEventListener("click", () => fold.setAttribute("aria-expanded", String(root.classList.toggle("fk-open"))));
  root.append(head, h("div", { class: "fk-columns" }, h("div", { class: "fk-main" }, log, notice, composer), side), card.node);
  el.append(root);

  function setDraft(text) {
    field.value = lastDraft = text;
  }

  /** Shows a message above the text field; an empty text removes it. */
  function say(text, kind = "news") {
    notice.textContent = text;
    notice.className = `fk-notice fk-${kind}`;
    notice.hidden = !text;
  }

  function showMeter({ used, context, cache_bytes: cacheBytes }) {
    meter.hidden = used === null || context === null;
    if (!meter.hidden) Object.assign(meter, { max: context, value: used, low: context * 0.75, high: context * 0.9, optimum: 0 });
    const parts = [
      used === null ? "context: reported after the answer" : `context: ${context === null ? tokenCount(used) : `${used} of ${context} tokens`}`,
      cacheBytes !== null && `KV cache ${bytes(cacheBytes)}`,
    ];
    meterText.textContent = parts.filter(Boolean).join(" · ");
  }

  /** Applies a change, and scrolls to the end if the end was visible before. */
  function keepAtEnd(change) {
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    change();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  /** Shows these turns only. Those that stay are not touched: a field in them keeps its focus. */
  function showTurns(nodes) {
    const shown = nodes.length ? nodes : [empty];
    keepAtEnd(() => {
      for (const node of [...log.children]) if (!shown.includes(node)) node.remove();
      shown.forEach((node, at) => node === log.children[at] || log.insertBefore(node, log.children[at]));
    });
  }

  const handlers = {
    start({ columns, examples: titles }) {
      clearTimeout(helloTimer);
      unheard = 0; // what was sent before the page was connected is lost
      title.textContent = columns.join(" and ");
      root.classList.toggle("fk-two", columns.length > 1);
      const heading = h("option", { value: "" }, "Examples …");
      examplesByTitle = titles;
      examples.replaceChildren(heading, ...Object.keys(titles).map((each) => h("option", { value: each }, each)));
    },
    turn({ turn }) {
      if (!turns.has(turn.id)) turns.set(turn.id, turnView(turn, act));
      turns.get(turn.id).update(turn); // one that is shown already may be read or edited
    },
    state(state) {
      [asked, sent] = [false, null];
      const focused = root.getRootNode().activeElement;
      const inside = root.contains(focused);
      const was = running;
      running = state.running;
      modes.show((modes.now = state.mode));
      modes.enable(!running);
      probabilities.checked = state.token_probabilities;
      root.classList.toggle("fk-probabilities", state.token_probabilities);
      guarded.checked = state.guarded;
      settings.show(state);
      fieldLabel.textContent = state.mode === "chat" ? "Message" : "Prompt";
      go.firstChild.data = state.mode === "chat" ? "Send" : "Generate";
      if (!unheard && !draftTimer && state.draft !== lastDraft) setDraft(state.draft);
      [go.disabled, stop.disabled, clear.disabled] = [Boolean(running), !running, Boolean(running) || !state.turns.length];
      [again.disabled, undo.disabled] = [clear.disabled, Boolean(running) || !state.can_undo];
      status.textContent = running ? "Generating …" : was ? "Ended" : ""; // read out
      say(state.notice.text, state.notice.kind);
      if (state.turns.some((id) => !turns.has(id))) return act("hello");
      for (const [id, view] of turns) view.message?.settle(state.turns.includes(id));
      showTurns(state.turns.map((id) => turns.get(id).node));
      showMeter(state.meter);
      if (inside && (focused.disabled || !focused.isConnected)) (running ? stop : go).focus(); // Escape is still heard
    },
    delta({ id, answers, meter: used }) {
      const turn = turns.get(id);
      let complete = Boolean(turn);
      keepAtEnd(() => {
        answers.forEach((answer, number) => {
          complete = complete && turn.answers[number].grow(answer.at, answer.spans);
          turn?.answers[number].update(answer);
        });
      });
      showMeter(used);
      if (!complete) act("hello");
    },
    meter({ meter: used }) {
      unheard = Math.max(0, unheard - 1);
      showMeter(used);
    },
    history: ({ turns: earlier }) => history.show(earlier),
    code: ({ id, code }) => turns.get(id)?.showCode(code),
  };
  /** Says that the kernel has not answered; a message that it may not have goes back into the text field. */
  function silence() {
    heard();
    say("The kernel does not answer. If it was restarted, run the cell again. If no cell is running, reload the page.", "error");
    if (sent !== null && field.value !== sent) setDraft([sent, field.value].filter(Boolean).join("\n"));
    [silent, asked, sent] = [true, false, null];
  }
  function heard() {
    clearTimeout(late);
    late = null;
    if (silent) say("");
    silent = false;
  }
  function listen(message) {
    // A page that is reloaded in the middle of an answer receives its pieces also where the kernel does not hear the page.
    if (message.type !== "delta" || title.textContent) heard();
    handlers[message.type]?.(message);
  }
  model.on("msg:custom", listen);

  function sendDraft() {
    clearTimeout(draftTimer);
    draftTimer = null;
    unheard += 1;
    act("draft", { text: (lastDraft = field.value) });
  }
  field.addEventListener("input", () => {
    clearTimeout(draftTimer);
    draftTimer = setTimeout(sendDraft, 250);
  });
  examples.addEventListener("change", () => {
    const title = examples.value;
    act("example", { title });
    setDraft(examplesByTitle[title][1]);
    examples.value = "";
    field.focus();
  });
  examples.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !/^(ArrowDown|ArrowUp|\S)$/.test(event.key)) return;
    event.preventDefault(); // an example would be taken at once; Enter takes one of the open list
    examples.showPicker();
  });
  root.addEventListener("keydown", (event) => {
    if (event.isComposing) return event.stopPropagation(); // Escape and Enter are those of an input method
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
    else if (event.key === "Escape") (card.hide(), running && act("stop"));
    else return event.stopPropagation(); // keeps the key from the notebook's shortcuts
    event.stopPropagation();
    event.preventDefault();
  });

  /** Shows the card for the token under the pointer or with the focus. */
  function point(event) {
    const token = event.target.closest?.(".fk-token");
    if (token && root.classList.contains("fk-probabilities")) card.show(token);
    else if (!card.node.contains(event.target)) card.hide();
  }
  root.addEventListener("mouseover", point);
  root.addEventListener("focusin", point);
  root.addEventListener("mouseleave", card.hide);

  // A reloaded page may not be connected to the kernel yet, so "hello" is repeated until the kernel answers. JupyterLab
  // 4.6 sometimes sends a reloaded page's messages to a subshell that ipykernel has ended; another reload repairs it.
  const sayHello = (times) => {
    act("hello");
    if (times === 3) silence();
    helloTimer = setTimeout(sayHello, 2000, times + 1);
  };
  sayHello(0);
  return () => {
    clearTimeout(draftTimer);
    clearTimeout(helloTimer);
    clearTimeout(late);
    model.off("msg:custom", listen);
  };
}

export default { render };
