// The stages outside the heads: tokens, embedding, LayerNorms, the fused projection, the MLP, the sums.

function tokensStage(act) {
  const view = stage("tokens", "Tokens");
  const row = h("div", { class: "fk-tokens", role: "group", "aria-label": "Tokens; the arrow keys choose one" });
  let shown = null; // the text whose tokens are in the row

  function fill({ text }) {
    const buttons = text.tokens.map(({ id, text: word }, at) => {
      const info = `token ${at}, id ${id}`;
      return h("button", { type: "button", tabindex: "-1", "data-info": info, "data-at": at, onclick: () => act.choose({ position: at }) }, tokenText(word), h("small", {}, at));
    });
    row.replaceChildren(...buttons);
  }

  /** Scrolls to the chosen token, unless some of it is in sight. */
  function reveal(chosen) {
    const [top, bottom] = [chosen.offsetTop - row.offsetTop, chosen.offsetTop - row.offsetTop + chosen.offsetHeight];
    if (bottom <= row.scrollTop || top >= row.scrollTop + row.clientHeight) row.scrollTop = bottom - row.clientHeight;
  }
  row.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(row.children.length - 1, act.state.position + step));
    if (row.children[at].disabled) return;
    act.choose({ position: at });
    row.children[at].focus();
  });

  view.update = (now) => {
    if (shown !== now.text) fill(now);
    shown = now.text;
    const { state, layer, text } = now;
    const width = state.position + 1;
    const weights = unpack(layer.probabilities).subarray(state.head * width, (state.head + 1) * width);
    [...row.children].forEach((button, at) => {
      const chosen = at === state.position;
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = chosen ? 0 : -1;
      button.disabled = !act.reachable({ layer: state.layer, position: at });
      button.style.setProperty("--weight", `${(100 * Math.sqrt(weights[at] ?? 0)).toFixed(1)}%`);
    });
    const most = argmax(weights);
    const token = (at) => [tokenText(text.tokens[at].text), ` (${at})`];
    const sentence = [
      `Head ${state.head} of layer ${state.layer}, at `, ...token(state.position), ", attends most to ", ...token(most),
      `: ${share(weights[most])}. The shading shows this head's attention.`,
    ];
    requestAnimationFrame(() => reveal(row.children[state.position])); // when it has its place
    view.show([row], sentence, `${plural(text.tokens.length, "token")} of at most ${count(text.spec.context)}`);
  };
  return view;
}

function embeddingStage() {
  const view = stage("embedding", "Embedding");
  view.update = ({ text, layer, state }) => {
    const { d_model: width, vocabulary } = text.spec;
    const first = state.layer === 0;
    const token = text.tokens[state.position];
    const name = first ? `row ${token.id} of the embedding` : `residual stream before layer ${state.layer}`;
    const sentence = first
      ? ["The token ", tokenText(token.text), ` becomes ${count(width)} numbers: row ${count(token.id)} of a table with ${count(vocabulary)} rows. No position is added here.`]
      : [`The residual stream carries the embedding of `, tokenText(token.text), ` and all that ${plural(state.layer, "layer")} added to it.`];
    view.show([vectorRow(name, layer.vectors.input, width)], sentence, `shape (T, d_model) = (${text.tokens.length}, ${count(width)}) · ${text.code.embedding}`);
  };
  return view;
}

function normsStage() {
  const view = stage("norms", "LayerNorm");
  const sentences = {
    two: "Two LayerNorms stand side by side, as in the 40B: one prepares the input of attention, the other that of the MLP.",
    one: "One LayerNorm prepares the input of attention and of the MLP, which run in parallel.",
    sequential: "The first LayerNorm comes before attention, the second after it, before the MLP.",
  };
  view.update = ({ text, layer }) => {
    const { d_model: width, norms_per_block: count, parallel_block: parallel } = text.spec;
    const rows = text.norms.map((name) => vectorRow(name, layer.vectors[name], width));
    const sentence = parallel ? sentences[count === 2 ? "two" : "one"] : sentences.sequential;
    view.show([vectorRow("before", layer.vectors.input, width), ...rows], sentence, `y = (x − mean) / √(variance + ε) · weight + bias · ${text.code.norms}`);
  };
  return view;
}

/** The fused projection: its rows in memory, group by group, and the chosen group in large. */
function projectionStage(act) {
  const view = stage("projection", "Queries, keys and values");
  const sentences = {
    grouped: (spec) => `${plural(spec.query_heads, "query head")} share ${plural(spec.kv_heads, "key head")}: ${spec.queries_per_kv_head} queries to one key and one value, so the KV cache keeps 1/${spec.queries_per_kv_head} of what one key for each query would take.`,
    "multi-query": (spec) => `All ${spec.query_heads} query heads share one key and one value (multi-query attention).`,
    "multi-head": () => "Each query head has its own key and value (multi-head attention).",
  };

  function parts(spec, group) {
    const queries = Array.from({ length: spec.queries_per_kv_head }, (_, at) => ["query", group * spec.queries_per_kv_head + at]);
    return [...queries, ["key", group], ["value", group]];
  }

  function memory(spec, chosen) {
    const groups = Array.from({ length: spec.kv_heads }, (_, group) => {
      const cells = parts(spec, group).map(([kind]) => h("i", { class: `fk-${kind}` }));
      const info = `group ${group}: rows ${count(group * cells.length * spec.head_dim)} to ${count((group + 1) * cells.length * spec.head_dim - 1)} of the fused projection`;
      return h("span", { class: group === chosen ? "fk-group fk-chosen" : "fk-group", "data-info": info }, ...cells);
    });
    const each = `${plural(spec.queries_per_kv_head, "query", "queries")} and a key and a value`;
    const label = `The fused projection: ${plural(spec.kv_heads, "group")}, each with ${each}`;
    const row = h("div", { class: "fk-memory", role: "img", tabindex: "0", "aria-label": label }, ...groups);
    walkCells(row, groups);
    return row;
  }

  function buttons(spec, group, head) {
    const size = spec.queries_per_kv_head;
    const readers = size === 1 ? `read by query head ${group}` : `shared by query heads ${group * size} to ${(group + 1) * size - 1}`;
    return parts(spec, group).map(([kind, number]) => {
      const [label, name] = [`${kind[0].toUpperCase()}${number}`, `${kind} head ${number}`];
      const cell = { class: `fk-cell fk-${kind}`, "data-info": kind === "query" ? `${name}: choose it` : `${name}, ${readers}` };
      if (kind !== "query") return h("span", cell, label);
      const choose = () => act.choose({ head: number });
      return h("button", { ...cell, type: "button", "aria-pressed": String(number === head), "aria-label": name, onclick: choose }, label);
    });
  }

  view.update = ({ text, head, state }) => {
    const { spec } = text;
    const rows = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim;
    const cells = buttons(spec, head.group, state.head);
    const chosen = h("div", { class: "fk-cells", role: "group", "aria-label": `Group ${head.group}` }, ...cells);
    const shape = `[${plural(spec.queries_per_kv_head, "query", "queries")}, key, value] × ${plural(spec.kv_heads, "group")} × ${spec.head_dim}`;
    const formula = `one matrix (${count(rows)} × ${count(spec.d_model)}): ${shape} · ${text.code.projection}`;
    view.show([memory(spec, head.group), chosen], sentences[spec.layout](spec), formula);
  };
  return view;
}

function mlpStage() {
  const view = stage("mlp", "MLP");
  view.update = ({ text, layer }) => {
    const { intermediate_size: neurons, d_model: width, parallel_block: parallel } = text.spec;
    const largest = Math.max(...layer.activations.map(Math.abs));
    const rows = layer.neurons.map((neuron, at) => {
      const value = layer.activations[at];
      const info = `neuron ${count(neuron)}: ${figure(value)}`;
      return h("tr", { "data-info": info }, rowName(count(neuron)), barCell(Math.abs(value) / largest), numberCell(value));
    });
    const table = h("table", {}, h("caption", {}, "The strongest neurons"), headings("neuron", "", "value"), h("tbody", {}, ...rows));
    const beside = parallel ? "It runs beside attention: both read the same residual stream." : "It runs after attention and reads its result.";
    const sentence = `${share(layer.active)} of the ${count(neurons)} neurons are above 0 for this token. ${beside}`;
    view.show([table, vectorRow("output of the MLP", layer.vectors.mlp, width)], sentence, `(${count(width)} → ${count(neurons)} → GELU → ${count(width)}) · ${text.code.mlp}`);
  };
  return view;
}

function residualStage() {
  const view = stage("residual", "The sums");
  view.update = ({ text, layer, state }) => {
    const names = { input: "before the layer", attention: "+ attention", mlp: "+ MLP", output: "= after the layer" };
    const width = text.spec.d_model;
    const largest = Math.max(...Object.keys(names).flatMap((name) => [...unpack(layer.vectors[name].first)].map(Math.abs)));
    const rows = Object.entries(names).map(([name, label]) => vectorRow(label, layer.vectors[name], width, largest));
    const [attention, mlp, input] = ["attention", "mlp", "input"].map((name) => layer.vectors[name].norm);
    const sentence = `Layer ${state.layer} adds vectors of norm ${figure(attention)} (attention) and ${figure(mlp)} (MLP) to a residual stream of norm ${figure(input)}.`;
    const formula = text.spec.parallel_block ? "x + attention(norm(x)) + MLP(norm(x))" : "y = x + attention(norm(x)); y + MLP(norm(y))";
    view.show(rows, sentence, `${formula} · ${text.code.residual}`);
  };
  return view;
}
