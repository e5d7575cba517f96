// Turns and answers: text that is streamed token by token, and the probabilities of each token.

const ENDINGS = {
  eos: "ended by the model",
  stop: "ended at a stop string",
  length: "length limit reached",
  cancelled: "stopped",
  broken: "connection broke",
  refused: "refused by the guardrails",
  error: "failed",
};

function milliseconds(seconds) {
  return seconds < 10 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

const tokenCount = (count) => (count === 1 ? "1 token" : `${count} tokens`);

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

const tokensOf = new WeakMap(); // the tokens of each span element

/** The level of the tokens' joint probability, from 0 (likely) to 5 (unlikely); null if it is not reported. */
function probabilityLevel(tokens) {
  if (tokens.some(([, logprob]) => logprob === null)) return null;
  const probability = Math.exp(tokens.reduce((sum, [, logprob]) => sum + logprob, 0));
  return [0.9, 0.7, 0.5, 0.3, 0.1].filter((bound) => probability < bound).length;
}

/** One model's answer. `grow` appends spans, `update` shows its statistics and ending. */
function answerView(turn, number, act) {
  let count = 0; // spans shown
  const generated = h("span", { class: "fk-generated" });
  const text = h("div", { class: "fk-text", tabindex: "0", role: "group", dir: "auto" }, generated);
  const facts = h("div", { class: "fk-facts" });
  const problem = h("div", { class: "fk-problem", role: "alert", hidden: true });
  const button = (label, title, onclick) => link({ title, onclick }, label);
  let usedSeed = null;
  const seed = button("", "Use this seed for the next text", () => act("set", { changes: { seed: usedSeed } }));
  const code = button("copy as code", "A cell that generates this text again", () => act("code", { id: turn.id }));
  const copyText = button("copy text", "Copy the text only", async () => {
    if (await copy(generated.textContent, generated)) copyText.textContent = "copied";
  });
  const tools = h("div", { class: "fk-tools", hidden: true }, seed, copyText, code);
  const name = h("div", { class: "fk-model" });
  const node = h("div", { class: "fk-answer" }, name, text, problem, h("div", { class: "fk-foot" }, facts, tools));
  if (turn.mode === "prompt") text.prepend(h("span", { class: "fk-prompt-text" }, turn.user));

  function grow(at, spans) {
    if (at > count) return false; // an update was lost
    for (const [shown, tokens] of spans.slice(count - at)) {
      const level = probabilityLevel(tokens);
      const kinds = ["fk-token", level === null ? "" : `fk-p${level}`, shown.startsWith("\n") ? "fk-break" : ""];
      const span = h("span", { class: kinds.join(" "), tabindex: "-1" }, shown);
      tokensOf.set(span, tokens);
      generated.append(span);
      count += 1;
    }
    return true;
  }

  function update(answer) {
    name.textContent = answer.model;
    text.setAttribute("aria-label", `Answer of ${answer.model}`);
    const parts = [
      tokenCount(answer.new_tokens),
      answer.tokens_per_second && `${answer.tokens_per_second.toFixed(answer.tokens_per_second < 10 ? 1 : 0)} tokens/s`,
      answer.first_token_seconds !== null && `first after ${milliseconds(answer.first_token_seconds)}`,
      answer.ending ? ENDINGS[answer.ending] : "generating",
    ];
    facts.textContent = parts.filter(Boolean).join(" · ");
    problem.textContent = answer.reason;
    problem.hidden = !answer.reason;
    tools.hidden = !answer.ending;
    usedSeed = answer.seed;
    seed.hidden = usedSeed === null;
    seed.textContent = `seed ${usedSeed}`;
    node.classList.toggle("fk-writing", !answer.ending);
  }

  text.addEventListener("keydown", (event) => walk(event, text));
  return { node, code, grow, update };
}

/** The arrow keys move the focus from token to token; the whole answer is one Tab stop. */
function walk(event, text) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !text.closest(".fk-probabilities")) return;
  const tokens = [...text.querySelectorAll(".fk-token")];
  const at = tokens.indexOf(text.getRootNode().activeElement);
  const next = at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step;
  tokens[Math.max(0, Math.min(next, tokens.length - 1))]?.focus();
  event.preventDefault();
}

/** A turn: the prompt or message, and the answers side by side. */
function turnView(turn, act) {
  const answers = turn.answers.map((_, number) => answerView(turn, number, act));
  const code = h("div", { class: "fk-code", hidden: true });
  const grid = h("div", { class: "fk-answers", "data-count": answers.length }, ...answers.map((each) => each.node));
  const message = turn.mode === "chat" ? messageView(turn, act) : null;
  const node = h("article", { class: `fk-turn fk-${turn.mode}` }, message?.node, grid, code);

  function update(turn) {
    turn.answers.forEach((answer, number) => {
      answers[number].grow(0, answer.spans);
      answers[number].update(answer);
    });
  }

  function showCode(source) {
    const shown = h("pre", { tabindex: "0", "aria-label": "A cell that generates this text again" }, source);
    const done = h("span", { role: "status" });
    const close = link({ onclick: () => ((code.hidden = true), answers[0].code.focus()) }, "close");
    const again = async () => (done.textContent = (await copy(source, shown)) ? "copied" : "select and copy");
    code.replaceChildren(shown, h("div", { class: "fk-tools" }, done, link({ onclick: again }, "copy"), close));
    code.hidden = false;
    again();
  }
  return { node, answers, message, update, showCode };
}

/** A message of the user, which can be edited. The field stays until the text is taken: the kernel may refuse it. */
function messageView(turn, act) {
  const text = h("div", { class: "fk-message-text" }, turn.user);
  const edit = link({ title: "Change the message and continue from here" }, "edit");
  const node = h("div", { class: "fk-message" }, text, edit);
  let sent = false; // and the kernel has not answered yet
  const close = () => node.replaceChildren(text, edit);
  edit.addEventListener("click", () => {
    const field = h("textarea", { "aria-label": "Edit the message", rows: "2", dir: "auto" }, turn.user);
    const back = () => (close(), edit.focus());
    const send = () => {
      if (!sent) act("edit", { id: turn.id, text: field.value });
      sent = true;
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return; // the key is one of an input method
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
      else if (event.key === "Escape") back();
      else return;
      event.stopPropagation();
      event.preventDefault();
    });
    const button = (label, onclick) => h("button", { type: "button", onclick }, label);
    node.replaceChildren(field, h("div", { class: "fk-row" }, button("Answer this", send), button("Cancel", back)));
    field.focus();
  });

  /** The kernel has answered: if the message is not in the conversation any more, the text that was sent was taken. */
  function settle(stays) {
    if (!stays && sent) close(); // what was not sent is still there when undo brings the message back
    sent = false;
  }
  return { node, settle };
}

/** The card with the most probable tokens at the position of a token. */
function probabilityCard(root) {
  const card = h("div", { class: "fk-card", role: "tooltip", id: unique("card"), hidden: true });
  let described = null; // the token that the card is about

  function show(token) {
    described?.removeAttribute("aria-describedby");
    described = token;
    token.setAttribute("aria-describedby", card.id);
    card.replaceChildren(...tokensOf.get(token).map(tokenTable));
    card.hidden = false;
    const [frame, place] = [root.getBoundingClientRect(), token.getClientRects()[0] ?? token.getBoundingClientRect()];
    const room = frame.width - card.offsetWidth - 8;
    card.style.left = `${Math.max(8, Math.min(place.left - frame.left, room))}px`;
    const below = place.bottom - frame.top + 4;
    const above = place.top - frame.top - card.offsetHeight - 4;
    card.style.top = `${place.bottom + card.offsetHeight + 8 > innerHeight && above > 0 ? above : below}px`;
  }

  function hide() {
    described?.removeAttribute("aria-describedby");
    described = null;
    card.hidden = true;
  }
  return { node: card, show, hide };
}

/** A table of the most probable tokens at a position, with the token that was chosen. */
function tokenTable([text, logprob, alternatives]) {
  const row = (word, value, chosen) =>
    h(
      "tr",
      { class: chosen ? "fk-chosen" : null },
      h("td", {}, chosen ? "✓" : ""),
      h("td", {}, h("bdi", {}, visible(word))),
      h("td", {}, h("span", { class: "fk-bar", style: `width:${(Math.exp(value) * 100).toFixed(1)}%` })),
      h("td", {}, share(Math.exp(value))),
    );
  const chosen = alternatives.findIndex(([word]) => word === text);
  const rows = alternatives.map(([word, value], number) => row(word, value, number === chosen));
  if (chosen < 0 && logprob !== null) rows.push(row(text, logprob, true));
  if (!rows.length) return h("div", {}, h("bdi", {}, visible(text)), ": no probabilities reported");
  return h("table", {}, h("caption", {}, "most probable tokens at this position"), h("tbody", {}, ...rows));
}
