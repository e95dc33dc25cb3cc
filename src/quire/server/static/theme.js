// Light, dark, or as the system has it; and colours for what is drawn on canvases.
const ORDER = ["auto", "light", "dark"], SAID = { auto: "as the system", light: "light", dark: "dark" };
const system = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;
let chosen = localStorage.getItem("quire.theme") ?? "auto";

export const changed = new EventTarget();
export const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

export function start(button) {
  const apply = () => {
    root.dataset.theme = chosen === "auto" ? (system.matches ? "dark" : "light") : chosen;
    button.textContent = chosen[0].toUpperCase() + chosen.slice(1);
    button.setAttribute("aria-label", `Colour theme: ${SAID[chosen]}`);
    changed.dispatchEvent(new Event("theme"));
  };
  button.addEventListener("click", () => {
    chosen = ORDER[(ORDER.indexOf(chosen) + 1) % ORDER.length];
    localStorage.setItem("quire.theme", chosen);
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}

// The mark: folded sheets, which is what a quire is. Also the icon of the tab.
export function drawMark(canvas, icon) {
  const draw = () => {
    const ratio = 2, size = 22 * ratio, pen = canvas.getContext("2d");
    canvas.width = canvas.height = size;
    canvas.style.width = canvas.style.height = "22px";
    const tones = [colour("cached"), colour("held"), colour("shared")];
    const cell = size / 3.4;
    for (let y = 0; y < 3; y++) for (let x = 0; x < 3; x++) {
      pen.fillStyle = [tones[1], tones[0], colour("free"), tones[1], tones[2], tones[0], tones[1], tones[2], tones[1]][y * 3 + x];
      pen.beginPath();
      pen.roundRect(x * cell * 1.17, y * cell * 1.17, cell, cell, cell / 4);
      pen.fill();
    }
    icon.href = canvas.toDataURL();
  };
  changed.addEventListener("theme", draw);
  draw();
}
