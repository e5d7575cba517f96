const tokens = [...root.querySelectorAll(".tokens span")];
let current = tokens.length - 1;
function select(index, show, focus) {
  tokens[current].tabIndex = -1;
  tokens[current].classList.remove("current");
  current = index;
  tokens[current].tabIndex = 0;
  tokens[current].classList.add("current");
  if (focus) tokens[current].focus();
  show();
}
function walk(show) {
  const box = root.querySelector(".tokens");
  const enter = event => {
    const at = tokens.indexOf(event.target.closest("span"));
    if (at >= 0 && at !== current) select(at, show);
  };
  box.addEventListener("pointerover", enter);
  box.addEventListener("focusin", enter);
  box.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const to = step ? current + step : {Home: 0, End: tokens.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to >= 0 && to < tokens.length) select(to, show, true);
  });
  select(current, show);
}
