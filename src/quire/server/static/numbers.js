// The numbers that matter, and the legend with its counts.
import { changed as themeChanged, colour } from "./theme.js";

const SAMPLES = 80, SMOOTH_S = 1.2;
const TILES = [["decode", "tokens/s generated"], ["prefill", "tokens/s prefilled"], ["running", "running"], ["hits", "cache hits"], ["used", "pages in use"]];
const RATES = ["decode", "prefill"];
const MEANING = { free: "free", held: "held", shared: "shared", cached: "cached", pinned: "pinned", moving: "to or from disk", retired: "given back", disk: "on disk only" };

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

export class Numbers {
  constructor(list, legend, size, feed) {
    Object.assign(this, { legend, size, looks: [], rates: { decode: [], prefill: [] } });
    this.values = Object.fromEntries(TILES.map(([name]) => [name, make("dd", { id: `number-${name}`, textContent: "–" })]));
    this.sparks = Object.fromEntries(RATES.map((name) => [name, make("canvas", { ariaHidden: "true" })]));
    list.append(...TILES.map(([name, text]) => {
      const tile = make("div", { className: "number" }, make("dt", { textContent: text, title: text }), this.values[name]);
      if (this.sparks[name]) tile.append(this.sparks[name]);
      return tile;
    }));
    feed.addEventListener("news", ({ detail: { message } }) => this.update(message));
    themeChanged.addEventListener("theme", () => this.#sparkle());
  }

  update({ status, at, stats, counts, disk, rows, prompt_tokens: prompt, cached_tokens: cached }) {
    if (status !== "ready") return;
    const total = Object.values(counts).reduce((sum, count) => sum + count, 0), used = total - counts.free - counts.retired - counts.cached;
    this.#rate(at, stats.num_drawn_tokens, stats.num_computed_tokens);
    clearTimeout(this.idle);
    if (!rows.length && RATES.some((name) => this.rates[name].at(-1))) this.idle = setTimeout(() => { // nothing more will come to say so
      this.#push({ decode: 0, prefill: 0 });
    }, SMOOTH_S * 1000);
    this.#say("running", stats.num_running.toLocaleString(), stats.num_waiting ? ` + ${stats.num_waiting.toLocaleString()} waiting` : "");
    this.#say("hits", prompt ? Math.round((100 * cached) / prompt) : "–", prompt ? "%" : "");
    this.#say("used", used.toLocaleString(), ` / ${total.toLocaleString()}`);
    this.size.textContent = `${total.toLocaleString()} pages`;
    if (!this.counts) {
      this.counts = {};
      for (const name of [...Object.keys(counts), ...(disk ? ["disk"] : [])]) {
        const swatch = make("i");
        swatch.style.setProperty("--swatch", `var(--${name})`);
        this.counts[name] = make("b");
        this.legend.append(make("li", { className: name }, swatch, `${MEANING[name]} `, this.counts[name]));
      }
    }
    for (const [name, count] of Object.entries(disk ? { ...counts, disk: disk.only } : counts)) {
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

  // A token that is drawn is fed back once; whatever else went through the model was prefill.
  #rate(at, drawn, computed) {
    if (this.looks.length && computed < this.looks.at(-1)[2]) this.looks = []; // another engine
    this.looks.push([at, drawn, computed]);
    while (this.looks.length > 2 && this.looks[1][0] < at - SMOOTH_S) this.looks.shift();
    const [before, drawnThen, computedThen] = this.looks[0], seconds = at - before, decoded = drawn - drawnThen;
    this.#push(seconds > 0 ? { decode: decoded / seconds, prefill: Math.max(0, computed - computedThen - decoded) / seconds } : { decode: 0, prefill: 0 });
  }

  #push(now) {
    for (const name of RATES) {
      const rates = this.rates[name];
      rates.push(now[name]);
      if (rates.length > SAMPLES) rates.shift();
      this.#say(name, Math.round(now[name]).toLocaleString());
    }
    this.#sparkle();
  }

  #sparkle() {
    for (const name of RATES) this.#spark(this.sparks[name], this.rates[name]);
  }

  #spark(spark, rates) {
    const width = spark.clientWidth, height = spark.clientHeight, ratio = devicePixelRatio || 1;
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
