// The diagram of the model: the residual stream above, the blocks that read it and add to it below. A box leads to its stage.

const ROWS = [14, 70, 122]; // the top of the residual stream, of attention, and of the MLP
const BOX_HEIGHT = 32;

/** The boxes [stage, label, row, left, width], in the order of the Tab key, and the lines of a layout: two LayerNorms, one, or one block after the other. */
function planOf({ parallel_block: parallel, norms_per_block: norms, layers }) {
  const from = [["tokens", "Tokens", 0, 6, 74], ["embedding", "Embedding", 0, 98, 92]];
  const to = [["prediction", "Next token", 0, 716, 92], ["cache", "KV cache", 0, 826, 80]];
  const attention = (left) => [["projection", "Q K V", 1, left, 64], ["rotary", "Positions", 1, left + 80, 80], ["attention", "Attention", 1, left + 176, 82]];
  const stream = "M80 30H98M190 30H716M808 30H826";
  const label = `× ${layers} layers`;
  if (parallel && norms === 2) {
    const boxes = [...from, ["norms", "LayerNorm", 1, 240, 88], ...attention(344), ["norms", "LayerNorm", 2, 240, 88], ["mlp", "MLP", 2, 424, 100], ["residual", "+", 0, 646, 32], ...to];
    return { boxes, label, lines: `${stream}M214 30V138H240M214 86H240M328 86H344M408 86H424M504 86H520M602 86H656V46M328 138H424M524 138H668V46` };
  }
  if (parallel) {
    const boxes = [...from, ["norms", "LayerNorm", 1, 232, 88], ...attention(352), ["mlp", "MLP", 2, 432, 100], ["residual", "+", 0, 646, 32], ...to];
    return { boxes, label, lines: `${stream}M214 30V86H232M320 86H352M336 86V138H432M416 86H432M512 86H528M610 86H656V46M532 138H668V46` };
  }
  const boxes = [...from, ["norms", "LayerNorm", 1, 232, 84], ...attention(330).map(([name, text, row, left, width]) => [name, text, row, left - 6, width - 10]), ["residual", "+", 0, 590, 32], ["norms", "LayerNorm", 2, 412, 84], ["mlp", "MLP", 2, 512, 96], ["residual", "+", 0, 658, 32], ...to];
  return { boxes, label, lines: `${stream}M214 30V86H232M316 86H324M378 86H404M474 86H500M572 86H606V46M634 30V112H396V138H412M496 138H512M608 138H674V46` };
}

function flow(stages) {
  const node = h("nav", { class: "fk-flow", "aria-label": "Diagram of the model: each box leads to its stage" });

  function box([name, label, row, left, width]) {
    const found = stages.find((each) => each.name === name);
    const open = (event) => {
      if (event.type === "keydown" && event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      found.focus();
    };
    const top = ROWS[row];
    const sum = label === "+";
    const frame = svg("rect", { x: left, y: top, width, height: BOX_HEIGHT, rx: sum ? 16 : 6 });
    const words = svg("text", { x: left + width / 2, y: top + 21 }, label);
    const button = { role: "button", tabindex: "0", "aria-label": sum ? found.title : label, "data-to": name };
    return svg("g", { ...button, onclick: open, onkeydown: open }, frame, words);
  }

  function update({ spec }) {
    const { boxes, lines, label } = planOf(spec);
    const frame = svg("rect", { class: "fk-layers", x: 202, y: 4, width: 500, height: 160, rx: 8 });
    const times = svg("text", { class: "fk-times", x: 694, y: 158 }, label);
    node.replaceChildren(svg("svg", { viewBox: "0 0 912 168", role: "group", "aria-label": "Diagram of the model" }, frame, times, svg("path", { d: lines }), ...boxes.map(box)));
  }
  return { node, update };
}
