// Turns and answers: text that grows token by token, and the odds behind each token.

const ENDINGS = {
  eos: "ended by itself",
  stop: "ended at a stop string",
  length: "as long as allowed",
  cancelled: "stopped",
  broken: "broke off",
  refused: "refused by the guardrails",
  error: "failed",
};

const behind = new WeakMap(); // the tokens that the characters of a span are made of

/** How unlikely a token was, in six steps; null where nobody says. */
function surprise(tokens) {
  if (tokens.some(([, logprob]) => logprob === null)) return null;
  const probability = Math.exp(tokens.reduce((sum, [, logprob]) => sum + logprob, 0));
  return [0.9, 0.7, 0.5, 0.3, 0.1].filter((bound) => probability < bound).length;
}

/** One model's answer. `grow` adds to it, `update` says how it stands. */
function answerView(turn, number, act) {
  let count = 0; // spans there are
  const said = h("span", { class: "fk-said" });
  const text = h("div", { class: "fk-text", tabindex: "0", role: "group" }, said);
  const facts = h("div", { class: "fk-facts" });
  const problem = h("div", { class: "fk-problem", role: "alert", hidden: true });
  const button = (label, title, onclick) => h("button", { type: "button", class: "fk-link", title, onclick }, label);
  const seed = button("", "Use this seed for what is written next", () => act("seed", { id: turn.id }));
  const code = button("copy as code", "The cell that writes this again", () => act("code", { id: turn.id }));
  const words = button("copy text", "The text alone", async () => {
    if (await copy(said.textContent, said)) words.textContent = "copied";
  });
  const tools = h("div", { class: "fk-tools", hidden: true }, seed, words, code);
  const name = h("div", { class: "fk-model" });
  const node = h("div", { class: "fk-answer" }, name, text, problem, h("div", { class: "fk-foot" }, facts, tools));
  if (turn.mode === "prompt") text.prepend(h("span", { class: "fk-given" }, turn.user));

  function grow(at, spans) {
    if (at > count) return false; // something is missing
    for (const [shown, tokens] of spans.slice(count - at)) {
      const level = surprise(tokens);
      const kinds = ["fk-token", level === null ? "" : `fk-p${level}`, shown.startsWith("\n") ? "fk-break" : ""];
      const span = h("span", { class: kinds.join(" "), tabindex: "-1" }, shown);
      behind.set(span, tokens);
      said.append(span);
      count += 1;
    }
    return true;
  }

  function update(answer) {
    name.textContent = answer.model;
    text.setAttribute("aria-label", `Answer of ${answer.model}`);
    const figures = [
      `${answer.new_tokens} tokens`,
      answer.tokens_per_second && `${answer.tokens_per_second.toFixed(answer.tokens_per_second < 10 ? 1 : 0)} tokens/s`,
      answer.first_token_seconds !== null && `first after ${milliseconds(answer.first_token_seconds)}`,
      answer.ending ? ENDINGS[answer.ending] : "writing",
    ];
    facts.textContent = figures.filter(Boolean).join(" · ");
    problem.textContent = answer.reason;
    problem.hidden = !answer.reason;
    tools.hidden = !answer.ending;
    seed.hidden = answer.seed === null;
    seed.textContent = `seed ${answer.seed}`;
    node.classList.toggle("fk-writing", !answer.ending);
  }

  text.addEventListener("keydown", (event) => walk(event, text));
  return { node, grow, update };
}

/** Arrow keys go from token to token; the answer itself is one stop of the Tab key. */
function walk(event, text) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !text.closest(".fk-odds")) return;
  const tokens = [...text.querySelectorAll(".fk-token")];
  const at = tokens.indexOf(document.activeElement);
  const next = at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step;
  tokens[Math.max(0, Math.min(next, tokens.length - 1))]?.focus();
  event.preventDefault();
}

/** A turn: what was written, and the answers to it beside each other. */
function turnView(turn, act) {
  const answers = turn.answers.map((_, number) => answerView(turn, number, act));
  const code = h("div", { class: "fk-code", hidden: true });
  const grid = h("div", { class: "fk-answers", "data-count": answers.length }, ...answers.map((each) => each.node));
  const node = h("article", { class: `fk-turn fk-${turn.mode}` }, turn.mode === "chat" ? asked(turn, act) : null, grid, code);
  turn.answers.forEach((answer, number) => {
    answers[number].grow(0, answer.spans);
    answers[number].update(answer);
  });

  function showCode(source) {
    const shown = h("pre", { tabindex: "0", "aria-label": "The cell that writes this again" }, source);
    const done = h("span", { role: "status" });
    const close = h("button", { type: "button", class: "fk-link", onclick: () => (code.hidden = true) }, "close");
    const again = async () => (done.textContent = (await copy(source, shown)) ? "copied" : "select and copy");
    code.replaceChildren(shown, h("div", { class: "fk-tools" }, done, h("button", { type: "button", class: "fk-link", onclick: again }, "copy"), close));
    code.hidden = false;
    again();
  }
  return { node, answers, showCode };
}

/** What a person said in a chat, with a way to say it differently. */
function asked(turn, act) {
  const words = h("div", { class: "fk-words" }, turn.user);
  const edit = h("button", { type: "button", class: "fk-link", title: "Say it differently, and go on from here" }, "edit");
  const node = h("div", { class: "fk-asked" }, words, edit);
  edit.addEventListener("click", () => {
    const field = h("textarea", { "aria-label": "Edit what you said", rows: "2" }, turn.user);
    const back = () => (node.replaceChildren(words, edit), edit.focus());
    const send = () => (act("edit", { id: turn.id, text: field.value }), back());
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
      else if (event.key === "Escape") back();
      else return;
      event.stopPropagation();
      event.preventDefault();
    });
    const button = (label, onclick) => h("button", { type: "button", onclick }, label);
    node.replaceChildren(field, h("div", { class: "fk-row" }, button("Answer this", send), button("Leave it", back)));
    field.focus();
  });
  return node;
}

/** The card that shows what else could have stood at a token's place. */
function oddsCard(root) {
  const card = h("div", { class: "fk-card", role: "tooltip", id: unique("card"), hidden: true });
  let held = null;

  function show(token) {
    held?.removeAttribute("aria-describedby");
    held = token;
    token.setAttribute("aria-describedby", card.id);
    card.replaceChildren(...behind.get(token).map(tokenOdds));
    card.hidden = false;
    const [frame, place] = [root.getBoundingClientRect(), token.getClientRects()[0] ?? token.getBoundingClientRect()];
    const room = frame.width - card.offsetWidth - 8;
    card.style.left = `${Math.max(8, Math.min(place.left - frame.left, room))}px`;
    const below = place.bottom - frame.top + 4;
    const above = place.top - frame.top - card.offsetHeight - 4;
    card.style.top = `${place.bottom + card.offsetHeight + 8 > innerHeight && above > 0 ? above : below}px`;
  }

  function hide() {
    held?.removeAttribute("aria-describedby");
    held = null;
    card.hidden = true;
  }
  return { node: card, show, hide };
}

/** One token, and the likeliest tokens at its place with their probabilities. */
function tokenOdds([text, logprob, alternatives]) {
  const line = (word, value, taken) =>
    h(
      "tr",
      { class: taken ? "fk-taken" : null },
      h("td", {}, taken ? "✓" : ""),
      h("td", {}, h("bdi", {}, visible(word))),
      h("td", {}, h("span", { class: "fk-bar", style: `width:${(Math.exp(value) * 100).toFixed(1)}%` })),
      h("td", {}, percent(value)),
    );
  const taken = alternatives.findIndex(([word]) => word === text);
  const rows = alternatives.map(([word, value], number) => line(word, value, number === taken));
  if (taken < 0 && logprob !== null) rows.push(line(text, logprob, true));
  if (!rows.length) return h("div", {}, h("bdi", {}, visible(text)), ": no odds were given");
  return h("table", {}, h("caption", {}, "what could stand here"), h("tbody", {}, ...rows));
}
