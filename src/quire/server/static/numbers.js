// The numbers that matter, and the legend with its counts.
import { changed as themeChanged, colour } from "./theme.js";

const SAMPLES = 80, SMOOTH_S = 1.2;
const TILES = [["rate", "tokens a second, computed"], ["running", "running"], ["waiting", "waiting"], ["hits", "cache hits"], ["used", "pages in use"]];
const MEANING = { free: "free", held: "held", shared: "shared", cached: "cached", pinned: "pinned", moving: "to or from disk", retired: "given back" };

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

export class Numbers {
  constructor(list, legend, size, feed) {
    Object.assign(this, { legend, size, looks: [], rates: [] });
    this.values = Object.fromEntries(TILES.map(([name]) => [name, make("dd", { id: `number-${name}`, textContent: "–" })]));
    this.spark = make("canvas", { ariaHidden: "true" });
    list.append(...TILES.map(([name, text]) => {
      const tile = make("div", { className: "number" }, make("dt", { textContent: text, title: text }), this.values[name]);
      if (name === "rate") tile.append(this.spark);
      return tile;
    }));
    feed.addEventListener("news", ({ detail: { message } }) => this.update(message));
    themeChanged.addEventListener("theme", () => this.#sparkle());
  }

  update({ status, at, stats, counts, rows, prompt_tokens: prompt, cached_tokens: cached }) {
    if (status !== "ready") return;
    const total = Object.values(counts).reduce((sum, count) => sum + count, 0), used = total - counts.free - counts.retired - counts.cached;
    this.#rate(at, stats.num_computed_tokens);
    clearTimeout(this.idle);
    if (!rows.length && this.rates.at(-1)) this.idle = setTimeout(() => { // nothing more will come to say so
      this.rates.push(0);
      this.#say("rate", "0");
      this.#sparkle();
    }, SMOOTH_S * 1000);
    this.#say("rate", Math.round(this.rates.at(-1)).toLocaleString());
    this.#say("running", stats.num_running.toLocaleString());
    this.#say("waiting", stats.num_waiting.toLocaleString());
    this.#say("hits", prompt ? Math.round((100 * cached) / prompt) : "–", prompt ? "%" : "");
    this.#say("used", used.toLocaleString(), ` / ${total.toLocaleString()}`);
    this.size.textContent = `${total.toLocaleString()} pages`;
    if (!this.counts) {
      this.counts = {};
      for (const name of Object.keys(counts)) {
        const swatch = make("i");
        swatch.style.setProperty("--swatch", `var(--${name})`);
        this.counts[name] = make("b");
        this.legend.append(make("li", { className: name }, swatch, `${MEANING[name]} `, this.counts[name]));
      }
    }
    for (const [name, count] of Object.entries(counts)) {
      const text = count.toLocaleString();
      if (this.counts[name].textContent === text) continue;
      this.counts[name].textContent = text;
      this.counts[name].parentElement.classList.toggle("none", !count);
    }
  }

  #say(name, value, unit = "") {
    const text = `${value}${unit}`;
    if (this.values[name].textContent !== text) this.values[name].replaceChildren(`${value}`, ...(unit ? [make("small", { textContent: unit })] : []));
  }

  #rate(at, computed) {
    if (this.looks.length && computed < this.looks.at(-1)[1]) this.looks = []; // another engine
    this.looks.push([at, computed]);
    while (this.looks.length > 2 && this.looks[1][0] < at - SMOOTH_S) this.looks.shift();
    const [before, then] = this.looks[0];
    this.rates.push(at > before ? (computed - then) / (at - before) : 0);
    if (this.rates.length > SAMPLES) this.rates.shift();
    this.#sparkle();
  }

  #sparkle() {
    const { spark, rates } = this, width = spark.clientWidth, height = spark.clientHeight, ratio = devicePixelRatio || 1;
    if (!width) return;
    if (spark.width !== Math.round(width * ratio)) [spark.width, spark.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const pen = spark.getContext("2d"), top = Math.max(1, ...rates);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.beginPath();
    rates.forEach((rate, i) => pen.lineTo(width - 1 - ((rates.length - 1 - i) * width) / SAMPLES, height - 2 - (rate / top) * (height - 4)));
    pen.strokeStyle = colour("accent");
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    pen.stroke();
  }
}
