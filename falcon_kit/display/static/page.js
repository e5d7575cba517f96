// Identical views share a class; `data-live` marks those that are already initialised.
for (const root of document.querySelectorAll(".SCOPE:not([data-live])")) {
  root.dataset.live = "";
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  ((root, data) => {SOURCE})(root, data);
}
