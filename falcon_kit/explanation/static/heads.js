// One head: the rotary embedding as turning hands, its scores and probabilities, the weighted sum of values.

const PAIRS = 6; // pairs of components that are drawn

/** A vector turned by the rotary embedding of `tokens` positions: the pairs are the components i and i + D / 2. */
function turned(vector, frequencies, tokens) {
  const half = vector.length / 2;
  const result = new Float32Array(vector.length);
  for (let pair = 0; pair < half; pair++) {
    const [x, y, angle] = [vector[pair], vector[pair + half], frequencies[pair] * tokens];
    result[pair] = x * Math.cos(angle) - y * Math.sin(angle);
    result[pair + half] = y * Math.cos(angle) + x * Math.sin(angle);
  }
  return result;
}

const dot = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);

/** A circle with the hands of a query and a key: one pair of their components. */
function dial(pair, frequency, query, key, before) {
  const half = query.length / 2;
  const hand = (vector, kind) => {
    const [x, y] = [vector[pair], vector[pair + half]];
    const length = Math.hypot(x, y) || 1;
    return svg("line", { class: kind, x1: 0, y1: 0, x2: (26 * x) / length, y2: (-26 * y) / length });
  };
  const turns = frequency >= 0.01 ? `${figure(frequency)} rad a token` : `a turn in ${count(Math.round((2 * Math.PI) / frequency))} tokens`;
  const info = `pair ${pair} (components ${pair} and ${pair + half}): ${turns}`;
  const hands = [hand(before[0], "fk-hand fk-query fk-before"), hand(before[1], "fk-hand fk-key fk-before"), hand(query, "fk-hand fk-query"), hand(key, "fk-hand fk-key")];
  const drawing = svg("svg", { viewBox: "-30 -30 60 60", "aria-hidden": "true" }, svg("circle", { r: 28 }), ...hands);
  return h("div", { class: "fk-dial", "data-info": info }, drawing, h("span", { class: "fk-note" }, `pair ${pair}: ${turns}`));
}

function rotaryStage() {
  const view = stage("rotary", "Positions");
  const slider = h("input", { type: "range", min: "0", max: "64", value: "0", id: unique("shift") });
  const result = h("output", { for: slider.id });
  const dials = h("div", { class: "fk-dials", role: "img" });
  const shift = h("label", { class: "fk-slider", for: slider.id }, "Move both tokens by ", slider, result);
  let now = null;

  function draw() {
    const { head, text } = now;
    const [query, key, query0, key0] = ["query", "key", "query_before", "key_before"].map((name) => unpack(head[name]));
    const moved = [query, key].map((vector) => turned(vector, text.frequencies, +slider.value));
    const half = query.length / 2;
    const pairs = Array.from({ length: PAIRS }, (_, at) => Math.round((at * (half - 1)) / (PAIRS - 1)));
    dials.replaceChildren(...pairs.map((pair) => dial(pair, text.frequencies[pair], ...moved, [query0, key0])));
    result.textContent = ` ${slider.value} tokens: score ${figure(dot(...moved) / Math.sqrt(query.length))}`;
  }
  slider.addEventListener("input", draw);

  function bias() {
    const scores = unpack(now.head.scores);
    const text = `This model has no rotary embedding. ALiBi adds a bias to each score instead, which grows with the position of the key. The scores below, ${plural(scores.length, "number")}, contain it.`;
    view.show([], text, "ALiBi: Press et al. 2021, arXiv 2108.12409");
  }

  view.update = (shown) => {
    now = shown;
    if (now.text.frequencies) hands();
    else bias();
  };

  function hands() {
    const { state, text, head } = now;
    slider.value = 0;
    draw();
    dials.setAttribute("aria-label", `${PAIRS} pairs of components of the query at ${state.position} and the key at ${head.key_position}, as hands of a clock`);
    const legend = h("p", { class: "fk-legend" }, h("b", { class: "fk-query" }, "query"), ` at position ${state.position}, `, h("b", { class: "fk-key" }, "key"), ` at position ${head.key_position}; pale: before turning`);
    const sentence = `Each pair of components turns by its own angle for each position. Moving both tokens turns both hands alike, so the score depends only on their distance, ${state.position - head.key_position}.`;
    view.show([legend, dials, shift], sentence, `angle = position × frequency; RoPE, Su et al. 2021, arXiv 2104.09864 · ${text.code.rotary}`);
  }
  return view;
}

/** The attention probabilities of a head for the whole text. The chosen token's row is framed. */
function attentionMap({ head, text, state }) {
  const values = unpack(head.map); // the lower triangle, row by row
  const side = Math.floor(Math.sqrt(2 * values.length));
  const probability = (row, column) => values[(row * (row + 1)) / 2 + column];
  const step = Math.ceil(text.tokens.length / side);
  const canvas = h("canvas", { width: side, height: side, class: "fk-map", role: "img", "aria-label": `Attention of head ${state.head} in layer ${state.layer}: rows are queries, columns are keys` });
  const context = canvas.getContext("2d");
  const picture = context.createImageData(side, side);
  for (let row = 0; row < side; row++)
    for (let column = 0; column < side; column++) {
      const colour = column > row ? [128, 128, 128, 28] : [230, 159, 0, Math.round(255 * Math.sqrt(probability(row, column)))];
      picture.data.set(colour, 4 * (row * side + column));
    }
  context.putImageData(picture, 0, 0);
  const frame = h("i", { class: "fk-frame", style: `top:${(100 * Math.floor(state.position / step)) / side}%;height:${100 / side}%` });
  canvas.addEventListener("mousemove", (event) => {
    const [row, column] = [event.offsetY / canvas.clientHeight, event.offsetX / canvas.clientWidth].map((at) => Math.min(side - 1, Math.max(0, Math.floor(at * side))));
    const span = (at) => (step === 1 ? `${at}` : `${at * step} to ${Math.min((at + 1) * step, text.tokens.length) - 1}`);
    canvas.dataset.info = column > row ? `query ${span(row)}, key ${span(column)}: masked, because it comes later` : `query ${span(row)}, key ${span(column)}: ${share(probability(row, column))}`;
    showInfo(canvas);
  });
  return h("div", { class: "fk-mapbox" }, canvas, frame);
}

/** The tokens that the head attends to, with scores, probabilities and the norms of their values. */
function keysTable({ head, text, state, layer, fixed }, act) {
  const width = state.position + 1;
  const [scores, norms] = [unpack(head.scores), unpack(head.values)];
  const probabilities = unpack(layer.probabilities).subarray(state.head * width, (state.head + 1) * width);
  const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 12).sort((a, b) => a - b);
  const rows = best.map((at) => {
    const [score, probability, norm] = [scores[at], probabilities[at], norms[at]];
    const pressed = String(at === head.key_position);
    const choose = () => act.choose({ attended: at });
    const name = link({ disabled: fixed, "aria-pressed": pressed, onclick: choose }, tokenText(text.tokens[at].text), ` ${at}`);
    return h(
      "tr",
      { "data-info": `key ${at}: score ${figure(score)}, probability ${share(probability)}, norm of its value ${figure(norm)}` },
      rowName(name),
      numberCell(score),
      barCell(probability),
      numberCell(probability, share(probability)),
      numberCell(norm),
    );
  });
  const caption = best.length < width ? `The ${best.length} most attended of ${width} keys` : `All ${plural(width, "key")}`;
  return h("table", {}, h("caption", {}, caption), headings("key", "score", "", "probability", "value's norm"), h("tbody", {}, ...rows));
}

function attentionStage(act) {
  const view = stage("attention", "Attention");
  view.update = (now) => {
    const { head, text, state } = now;
    const { head_dim: width } = text.spec;
    const output = h("div", { class: "fk-vector" }, h("p", { class: "fk-name" }, "weighted sum of values"), strip("weighted sum of values", unpack(head.output), width));
    const later = text.tokens.length - 1 - state.position;
    const mask = later ? `${plural(later, "later token")} ${later === 1 ? "is" : "are"} masked.` : "No later token is there to be masked.";
    const sentence = `Each score becomes a probability by softmax; they add up to 100%. ${mask} The head returns the values of group ${head.group}, weighted by these probabilities.`;
    view.show([h("div", { class: "fk-pair" }, attentionMap(now), keysTable(now, act)), output], sentence, `softmax(q · k / √${width}) v · ${text.code.attention}`);
  };
  return view;
}
