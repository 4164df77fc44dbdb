// Colours as the system has them, or as somebody chose. Loaded before the page is drawn, so that nothing flashes.
(() => {
  "use strict";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const read = () => {
    try { return localStorage.getItem("theme"); } catch { return null; }
  };
  const keep = (choice) => {
    try { localStorage.setItem("theme", choice); } catch { /* a browser that keeps nothing */ }
  };
  let choice = ["light", "dark"].includes(read()) ? read() : "auto";
  const words = {
    auto: ["Auto", "as the system has them"],
    light: ["Light", "light"],
    dark: ["Dark", "dark"],
  };

  function show() {
    const dark = choice === "dark" || (choice === "auto" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = words[choice][0];
      button.setAttribute("aria-label", `Colours: ${words[choice][1]}`);
    }
  }

  system.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      choice = { auto: "light", light: "dark", dark: "auto" }[choice];
      keep(choice);
      show();
    });
    show();
  });
  show();
})();
