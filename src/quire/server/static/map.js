// The cache map: a cell for each page on one canvas, where only cells that have changed are drawn again.
import { changed as themeChanged, colour } from "./theme.js";

export const PINNED = 8, ON_DISK = 16, STATE = 7;
const MARKS = 32;
const LARGEST = 20, SMALLEST = 3, TALLEST = 400, MARGIN = 3; // the margin is for the frame around a page

export class CacheMap {
  constructor(box, canvas, feed) {
    this.box = box; this.canvas = canvas; this.feed = feed;
    this.pen = canvas.getContext("2d", { alpha: false });
    this.drawn = new Uint8Array(0); // what each cell shows
    this.frames = []; // milliseconds that the last drawings took
    this.relaid = new EventTarget();
    feed.addEventListener("news", ({ detail }) => this.update(detail.changed));
    themeChanged.addEventListener("theme", () => this.#paint());
    new ResizeObserver(() => this.lay()).observe(box);
    this.#paint();
  }

  update(changed) {
    const { states } = this.feed;
    if (changed === null || states.length !== this.drawn.length) {
      this.drawn = new Uint8Array(states.length);
      this.lay();
    } else if (changed.length) {
      this.#draw(changed);
    }
  }

  // Choose the largest cells with which all pages fit.
  lay() {
    const num = this.feed.states.length, width = this.box.clientWidth - 2 * MARGIN;
    if (!num || width <= 0) return;
    let cell = Math.max(SMALLEST, Math.min(LARGEST, Math.floor(Math.sqrt((width * TALLEST) / num))));
    while (cell > SMALLEST && Math.ceil(num / Math.floor(width / cell)) * cell > TALLEST) cell--;
    this.ratio = window.devicePixelRatio || 1;
    this.cell = cell;
    this.columns = Math.min(num, Math.floor(width / cell));
    this.gap = cell >= 9 ? 2 : 1;
    const height = Math.ceil(num / this.columns) * cell;
    for (const [side, length] of [["width", this.columns * cell + 2 * MARGIN], ["height", height + 2 * MARGIN]]) {
      this.canvas[side] = Math.round(length * this.ratio);
      this.canvas.style[side] = `${length}px`;
    }
    this.pen.setTransform(this.ratio, 0, 0, this.ratio, MARGIN * this.ratio, MARGIN * this.ratio);
    this.canvas.hidden = false;
    this.#drawAll();
    this.relaid.dispatchEvent(new Event("relaid"));
  }

  pageAt(x, y) {
    const column = Math.floor((x - MARGIN) / this.cell), page = Math.floor((y - MARGIN) / this.cell) * this.columns + column;
    return column >= 0 && column < this.columns && page >= 0 && page < this.drawn.length ? page : -1;
  }

  // The middle of a cell.
  place(page) {
    const half = MARGIN + (this.cell - this.gap) / 2;
    return [(page % this.columns) * this.cell + half, Math.floor(page / this.columns) * this.cell + half];
  }

  #paint() {
    const names = ["free", "held", "shared", "cached", "pinned", "moving", "retired"];
    this.colours = names.map(colour);
    this.ground = colour("panel");
    this.rim = colour("line");
    this.disk = colour("moving");
    this.#drawAll();
  }

  #drawAll() {
    if (!this.columns) return;
    this.pen.fillStyle = this.ground;
    this.pen.fillRect(-MARGIN, -MARGIN, this.canvas.width, this.canvas.height);
    this.#draw(this.feed.states.keys());
  }

  #draw(pages) {
    const began = performance.now(), { states } = this.feed, byState = Array.from({ length: MARKS }, () => []);
    for (const page of pages) byState[states[page] & (MARKS - 1)].push(page);
    byState.forEach((some, state) => { if (some.length) this.#drawSome(some, state); });
    this.frames.push(performance.now() - began);
    if (this.frames.length > 600) this.frames.shift();
  }

  #drawSome(pages, state) {
    const { pen, cell, columns, drawn } = this, side = cell - this.gap, kind = state & STATE;
    const round = cell >= 9 && pages.length < 3000 ? Math.min(3, side / 5) : 0;
    const each = (draw) => { for (const page of pages) draw((page % columns) * cell, Math.floor(page / columns) * cell); };
    if (round) {
      pen.fillStyle = this.ground;
      each((x, y) => pen.fillRect(x, y, side, side));
    }
    pen.fillStyle = this.colours[kind];
    if (round) {
      pen.beginPath();
      each((x, y) => pen.roundRect(x, y, side, side, round));
      pen.fill();
    } else each((x, y) => pen.fillRect(x, y, side, side));
    if (this.feed.names[kind] === "retired" && cell >= 6) {
      pen.strokeStyle = this.rim;
      each((x, y) => pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1));
    }
    if (state & PINNED && this.feed.names[kind] !== "pinned") { // a corner in the pins' colour
      pen.fillStyle = this.colours[4];
      const corner = Math.max(2, side / 2.6);
      each((x, y) => { pen.beginPath(); pen.moveTo(x + side - corner, y); pen.lineTo(x + side, y); pen.lineTo(x + side, y + corner); pen.fill(); });
    }
    if (state & ON_DISK && side >= 4) { // a foot in the disk's colour
      const foot = Math.max(1, Math.round(side / 5));
      pen.fillStyle = this.ground;
      if (side >= 9) each((x, y) => pen.fillRect(x, y + side - foot - 1, side, 1));
      pen.fillStyle = this.disk;
      each((x, y) => pen.fillRect(x, y + side - foot, side, foot));
    }
    for (const page of pages) drawn[page] = state;
  }
}
