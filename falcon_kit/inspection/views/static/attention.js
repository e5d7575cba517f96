const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const maps = data.maps.map(map => (
  {keys: new Uint16Array(bytes(map.keys).buffer), weights: bytes(map.weights), name: map.name}
));
const buttons = [...root.querySelectorAll(".heads button")];
const large = root.querySelector(".large"), description = root.querySelector(".description"), K = data.kept;
let shown = 0, coloured = [];
const percent = share => (share < .01 ? "<1" : Math.round(100 * share)) + "%";
function quote(token) {
  const mark = document.createElement("code");
  mark.append(...[...token.childNodes].map(node => node.cloneNode(true)));
  return mark;
}
function showAttention() {
  for (const token of coloured) token.style.background = "";
  const map = maps[shown], found = [];
  for (let k = current * K; k < (current + 1) * K; k++)
    if (map.weights[k]) found.push([map.keys[k], map.weights[k] / 255]);
  coloured = found.map(([at, share]) => {
    tokens[at].style.background = `color-mix(in srgb, var(--c1) ${Math.round(15 + 75 * share)}%, transparent)`;
    return tokens[at];
  });
  const top = found.sort((a, b) => b[1] - a[1]).slice(0, 5);
  description.replaceChildren(`${map.name}: token ${current}, `, quote(tokens[current]), " attends to ");
  top.forEach(([at, share], index) =>
    description.append(index ? ", " : "", quote(tokens[at]), ` ${at} (${percent(share)})`));
  if (!top.length) description.append("no token with more than 0.2%");
}
function selectMap(index) {
  shown = index;
  buttons.forEach((button, at) => button.setAttribute("aria-pressed", at === index));
  const small = buttons[index].querySelector("img"), big = large.querySelector("img");
  big.src = small.src;
  big.alt = small.alt;
  large.querySelector("figcaption").textContent = maps[index].name;
  showAttention();
}
buttons.forEach((button, index) => {
  button.disabled = false;
  button.addEventListener("click", () => selectMap(index));
});
root.querySelector(".hint").hidden = false;
walk(showAttention);
selectMap(0);
