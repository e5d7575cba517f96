// The next token: its distribution under temperature, top-k and top-p; the route back; the KV cache.

const SHOWN_TOKENS = 12;

/** The probabilities after temperature, top-k and top-p, in the order of `order` (likeliest first), as transformers has them. */
function distribution(logits, order, { temperature, topK, topP }) {
  const kept = topK > 0 ? Math.min(topK, order.length) : order.length;
  const result = new Float64Array(order.length);
  if (temperature === 0) {
    result[0] = 1;
    return result;
  }
  let sum = 0;
  for (let at = 0; at < kept; at++) sum += result[at] = Math.exp((logits[order[at]] - logits[order[0]]) / temperature);
  let before = 0; // the probability of all likelier tokens
  let left = 0;
  for (let at = 0; at < kept; at++) {
    const probability = result[at] / sum;
    result[at] = at > 0 && before >= topP ? 0 : probability;
    left += result[at];
    before += probability;
  }
  for (let at = 0; at < kept; at++) result[at] /= left;
  return result;
}

function predictionStage(act) {
  const view = stage("prediction", "The next token");
  const settings = { temperature: 1, topK: 0, topP: 1 };
  const controls = [
    ["temperature", "temperature", 0, 2, 0.05, (value) => (value === 0 ? "0: always the likeliest" : value.toFixed(2))],
    ["topK", "top-k", 0, 50, 1, (value) => (value === 0 ? "off" : value)],
    ["topP", "top-p", 0.05, 1, 0.01, (value) => (value === 1 ? "off" : value.toFixed(2))],
  ].map(([name, label, min, max, step, format]) => {
    const input = h("input", { type: "range", min, max, step, value: settings[name], id: unique(name), "data-setting": name });
    const output = h("output", { for: input.id }, format(settings[name]));
    input.addEventListener("input", () => ((settings[name] = +input.value), (output.textContent = format(settings[name])), draw()));
    return h("label", { class: "fk-slider", for: input.id }, h("span", {}, label), input, output);
  });
  const body = h("tbody", {});
  const table = h("table", { class: "fk-next" }, h("caption", {}, "The likeliest next tokens"), headings("token", "logit", "", "probability", "", "with the settings", ""), body);
  const sample = h("button", { type: "button", class: "fk-go", onclick: () => drawOne() }, "Draw a token");
  let now, logits, order, plain;

  function read(text) {
    logits = unpack(text.logits);
    order = Uint32Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
    plain = distribution(logits, order, { temperature: 1, topK: 0, topP: 1 });
  }

  function draw() {
    const found = distribution(logits, order, settings);
    const words = now.text.named.slice(0, SHOWN_TOKENS);
    const rows = words.map(({ id, text }, at) => {
      const [logit, before, after] = [logits[id], plain[at], found[at]];
      const take = { disabled: now.fixed, "aria-label": `Take the token ${visible(text)}`, onclick: () => act.take(id) };
      const info = `id ${id}: logit ${figure(logit)}, ${share(before)}, with the settings ${share(after)}`;
      return h(
        "tr",
        { class: after === 0 ? "fk-excluded" : null, "data-info": info },
        rowName(tokenText(text)),
        numberCell(logit),
        barCell(before),
        numberCell(before, share(before)),
        barCell(after, "fk-warmbar"),
        numberCell(after, share(after)),
        h("td", {}, link(take, "take")),
      );
    });
    body.replaceChildren(...rows);
  }

  function drawOne() {
    const found = distribution(logits, order, settings);
    let point = Math.random();
    const at = found.findIndex((value) => (point -= value) < 0);
    act.take(order[Math.max(0, at)]);
  }

  view.update = (shown) => {
    const { text } = (now = shown);
    if (!logits || view.text !== text) read(text);
    view.text = text;
    sample.disabled = now.fixed;
    draw();
    const first = text.named[0];
    const vocabulary = count(text.spec.vocabulary);
    const sentence = [
      `After the last layer, a LayerNorm and the output head give each of the ${vocabulary} tokens a logit. `,
      "The likeliest next token is ", tokenText(first.text), `, ${share(plain[0])}. `,
      "Temperature, top-k and top-p then change what is drawn from.",
    ];
    const how = now.fixed ? h("p", { class: "fk-note" }, "This page has no kernel: run fk.explain in a notebook to take a token.") : sample;
    const formula = `logits (V,) = (${vocabulary},) → / temperature → top-k → top-p → softmax · ${text.code.sampling}`;
    view.show([h("div", { class: "fk-sliders" }, ...controls), table, how], sentence, formula);
  };
  return view;
}

/** The route of the prediction: a line through tokens (across) and layers (upwards). */
function routeStage(act) {
  const view = stage("route", "What the prediction looked at");
  let text = null; // what the view shows
  let followed = null; // the text whose route is drawn
  let asked = false; // for a route that is not drawn yet
  view.update = (now) => {
    text = now.text;
    if (followed === text) return;
    // The route of a text that is not drawn yet waits for it.
    const draw = (steps) => text === now.text && act.isNewest(text) && view.keepFocus(() => show(text, steps));
    const follow = () => ((asked = true), act.ask("route").then(draw, () => (asked = false))); // the view shows an error
    const button = h("button", { type: "button", onclick: follow }, "Follow it back");
    const note = h("p", { class: "fk-note" }, "This view has no kernel and holds no route: .to_html(path) writes a page that does.");
    const sentence = "From the last token, the route follows in each layer the head and the earlier token that mattered most.";
    const formula = "largest probability × norm of the value (Kobayashi et al. 2020, arXiv 2004.10102)";
    view.show([now.routed ? button : note], sentence, formula);
    if (asked || (now.fixed && now.routed)) follow();
  };

  /** The points (token, layer) of the route, with the layers upwards and the tokens below. */
  function picture({ tokens, spec }, steps) {
    const [left, step, rise] = [54, Math.max(9, Math.min(44, 800 / tokens.length)), Math.max(8, Math.min(22, 300 / spec.layers))];
    const [x, y] = [(at) => left + (at + 0.5) * step, (layer) => 14 + (spec.layers - layer) * rise];
    const points = [[steps[0].position, spec.layers], ...steps.map(({ key, layer }) => [key, layer])];
    const line = svg("polyline", { points: points.map(([at, layer]) => `${x(at)},${y(layer)}`).join(" ") });
    const circles = points.map(([at, layer]) => svg("circle", { cx: x(at), cy: y(layer), r: 4 }));
    const visited = new Set(points.map(([at]) => at));
    const words = [...visited].map((at) => svg("text", { transform: `translate(${x(at) - 4} ${y(0) + 12}) rotate(40)` }, visible(tokens[at].text).slice(0, 12)));
    const ends = [svg("text", { x: 0, y: y(spec.layers) + 4 }, `layer ${spec.layers - 1}`), svg("text", { x: 0, y: y(0) + 4 }, "layer 0")];
    const [width, height] = [left + tokens.length * step + 60, y(0) + 80];
    const label = "The route of the prediction, from the last layer down to the first";
    const attributes = { class: "fk-route", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label };
    return svg("svg", attributes, line, ...circles, ...words, ...ends);
  }

  function show(text, steps) {
    [followed, asked] = [text, false];
    const items = steps.map((step) => {
      const itself = step.key === step.position;
      const { layer, head, position } = step;
      const token = (at) => [tokenText(text.tokens[at].text), ` ${at}`];
      const choose = { disabled: !act.reachable(step), onclick: () => act.choose({ layer, head, position }) };
      const source = itself ? [" takes nothing from earlier tokens"] : [" ← ", ...token(step.key), ` (${share(step.probability)})`];
      return h("li", {}, link(choose, `layer ${layer}, head ${head}`), ": ", ...token(position), ...source);
    });
    const attributes = { class: "fk-scroll", tabindex: "0", role: "group", "aria-label": "The route as a picture" };
    const scroll = h("div", attributes, picture(text, steps));
    view.body.replaceChildren(scroll, h("ol", { class: "fk-steps" }, ...items));
    scroll.scrollLeft = scroll.scrollWidth; // the route begins at the last token
  }
  return view;
}

function cacheStage() {
  const view = stage("cache", "The KV cache");
  view.update = ({ text }) => {
    const { grouped, transformers, dtype } = text.cache;
    const tokens = text.tokens.length;
    const { context } = text.spec;
    const row = (name, size, kind) => {
      const full = h("td", { class: "fk-wrap" }, `${bytes(size * context)} for ${count(context)} tokens`);
      const shown = barCell(size / Math.max(transformers, grouped), kind);
      return h("tr", {}, rowName(name), shown, numberCell(size * tokens, bytes(size * tokens)), full);
    };
    const rows = [row("this architecture", grouped), row("transformers' own Falcon", transformers, "fk-warmbar")];
    const caption = h("caption", {}, `Keys and values of ${plural(tokens, "token")} in ${dtype}`);
    const times = count(Math.round((transformers / grouped) * 10) / 10);
    const other = `transformers' own Falcon copies each key and value to all query heads of its group and keeps ${times} times as much.`;
    const added = `Each new token adds ${bytes(grouped)}`;
    const sentence = transformers > grouped ? `${added}. ${other}` : `${added}, here and in transformers' own Falcon.`;
    view.show([h("table", {}, caption, h("tbody", {}, ...rows))], sentence, `2 × layers × KV heads × head_dim × bytes · ${text.code.cache}`);
  };
  return view;
}
