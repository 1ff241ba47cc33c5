// Sets light or dark before anything is drawn, so that a page never flashes in the other one.
(() => {
  let choice = null;
  try {
    choice = localStorage.getItem("qengine:theme");
  } catch {
    // Storage is switched off: the system's choice stands.
  }
  if (choice === "light" || choice === "dark") document.documentElement.dataset.theme = choice;
})();
