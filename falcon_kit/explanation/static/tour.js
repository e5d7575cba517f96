// The guided tour: ten cards, each about one stage.

/** The cards [stage, words] for a model of this shape. */
function cards({ layout, parallel_block: parallel, norms_per_block: norms, positions }) {
  const order = parallel ? "Here attention and the MLP run in parallel" : "Here the MLP runs after attention";
  const reads = norms === 2 ? "each has a LayerNorm of its own" : "both read the result of one LayerNorm";
  const small = "that is what keeps the KV cache small";
  const [sharing, kept] = {
    grouped: [`Several query heads share one key and one value: ${small}.`, "Look at how little this architecture keeps."],
    "multi-query": [`All query heads share one key and one value: ${small}.`, "One key and one value for all heads are little to keep."],
    "multi-head": ["Each query head has its own key and value.", "Here each head keeps its own."],
  }[layout];
  const rotary = "Queries and keys are turned by an angle that grows with their position. Move the slider: both hands turn, and the score stays the same.";
  const alibi = "A bias tells attention the order of the tokens: of two keys that fit the query equally well, the nearer one gets more attention.";
  return [
    ["tokens", "Falcon reads tokens, pieces of text from a fixed vocabulary. It predicts one token at a time: the next one."],
    ["embedding", "Each token becomes a vector, its row of the embedding. These vectors are the residual stream: every layer reads them and adds to them."],
    ["norms", `A LayerNorm brings each vector to the same scale before a block reads it. ${order}, and ${reads}.`],
    ["projection", `One matrix computes all queries, keys and values. ${sharing}`],
    ["rotary", positions === "alibi" ? alibi : rotary],
    ["attention", "A query times each key gives a score; later tokens are masked; softmax makes probabilities. The head returns the values, weighted by them."],
    ["mlp", `${parallel ? "Beside" : "After"} attention, the MLP looks at each token on its own. A few of its neurons answer strongly.`],
    ["residual", "Both results are added to the residual stream. The next layer reads the sum, and so on up to the last layer."],
    ["prediction", "The last vector becomes a logit for each token of the vocabulary. Move the sliders. In a notebook, take a token: it joins the text."],
    ["cache", `Keys and values are kept, so that the next token does not compute them again. ${kept}`],
  ];
}

function tour(stages, diagram) {
  let at = 0;
  let shown = [];
  const place = h("span", { class: "fk-note" });
  const text = h("p", {});
  const button = (label, step) => h("button", { type: "button", onclick: () => go(at + step) }, label);
  const [back, next] = [button("Back", -1), button("Next", 1)];
  const end = link({ onclick: () => show(false) }, "end the tour");
  const card = h("aside", { class: "fk-tour", "aria-label": "Guided tour", hidden: true }, h("div", { "aria-live": "polite" }, place, text), h("div", { class: "fk-row" }, back, next, end));
  const start = h("button", { type: "button", class: "fk-go", disabled: true, onclick: () => (show(true), go(0)) }, "Start the tour");

  function show(open) {
    card.hidden = !open;
    start.hidden = open;
    if (!open) mark(null);
    if (!open) start.focus();
  }

  /** Frames a stage and its box in the diagram. */
  function mark(found) {
    for (const each of stages) each.node.classList.toggle("fk-toured", each === found);
    for (const box of diagram.querySelectorAll("[data-to]")) box.classList.toggle("fk-toured", box.dataset.to === found?.name);
  }

  function go(number) {
    at = Math.max(0, number);
    if (at === shown.length) show(false);
    else visit();
  }

  function visit() {
    const [name, words] = shown[at];
    const found = stages.find((each) => each.name === name);
    mark(found);
    place.textContent = `${at + 1} of ${shown.length}: ${found.title}`;
    text.textContent = words;
    back.disabled = at === 0;
    if (at === 0) next.focus(); // the button that was pressed is hidden or disabled
    next.textContent = at === shown.length - 1 ? "Done" : "Next";
    found.node.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }

  function update({ spec }) {
    shown = cards(spec);
    start.disabled = false;
  }
  card.addEventListener("keydown", (event) => event.key === "Escape" && show(false));
  return { card, start, update };
}
