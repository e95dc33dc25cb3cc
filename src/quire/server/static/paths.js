// Above the cells: sequences as lines through their pages, and a frame around the page that is looked at.
import { nameOf } from "./feed.js";
import { changed as themeChanged, colour } from "./theme.js";

const MOST = 12, MOST_SMALL = 4; // lines at once, when all are asked for: over small cells more would hide them

export class Paths {
  constructor(canvas, map, select, feed) {
    Object.assign(this, { canvas, map, select, feed, page: -1 });
    this.pen = canvas.getContext("2d");
    feed.addEventListener("news", () => { this.#offer(); this.soon(); });
    select.addEventListener("change", () => this.soon());
    map.relaid.addEventListener("relaid", () => this.soon());
    themeChanged.addEventListener("theme", () => this.soon());
    this.#offer();
  }

  look(page) {
    this.page = page;
    this.soon();
  }

  soon() {
    this.waiting ??= requestAnimationFrame(() => { this.waiting = undefined; this.#draw(); });
  }

  // The choice of sequences, changed in place so that an open list stays open.
  #offer() {
    const own = [...this.feed.rows.values()].filter((row) => row.id && row.pages).slice(0, 40);
    const wanted = [["page", "of the page looked at"], ["all", "of all that run"], ["none", "none"], ...own.map((row) => [`${row.k}`, nameOf(row)])];
    const there = [...this.select.options].map((option) => option.value).join();
    if (there === wanted.map(([value]) => value).join()) return;
    const chosen = this.select.value || "all";
    this.select.replaceChildren(...wanted.map(([value, text]) => new Option(text, value)));
    this.select.value = wanted.some(([value]) => value === chosen) ? chosen : "all";
  }

  #chosen() {
    const looked = this.page < 0 ? [] : this.feed.holders(this.page);
    const most = this.map.cell < 9 ? MOST_SMALL : MOST;
    if (looked.length) return looked.slice(0, most);
    const rows = [...this.feed.rows.values()].filter((row) => row.pages);
    if (this.select.value === "all") return rows.slice(0, most);
    return rows.filter((row) => `${row.k}` === this.select.value);
  }

  #draw() {
    const { pen, map } = this;
    if (!map.columns) return;
    const chosen = this.#chosen();
    if (this.canvas.width !== map.canvas.width || this.canvas.height !== map.canvas.height) {
      for (const side of ["width", "height"]) {
        this.canvas[side] = map.canvas[side];
        this.canvas.style[side] = map.canvas.style[side];
      }
    } else if (this.blank && !chosen.length && this.page < 0) return;
    pen.setTransform(map.ratio, 0, 0, map.ratio, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.blank = !chosen.length && this.page < 0;
    const ink = colour("ink"), ground = colour("panel");
    chosen.forEach((row) => row.pages.forEach((pages) => pages?.length && this.#line(pages, row, ink, ground, chosen.length)));
    if (this.page >= 0) {
      const [x, y] = map.place(this.page), half = (map.cell - map.gap) / 2 + 1;
      pen.strokeStyle = ink;
      pen.lineWidth = 2;
      pen.strokeRect(x - half, y - half, 2 * half, 2 * half);
    }
  }

  // Straight along neighbours, in a bow where it jumps; from the end of a row it goes on in the next as text does, with no line back across the map.
  #line(pages, row, ink, ground, num) {
    const { pen, map } = this, points = pages.map((page) => map.place(page)), far = map.cell * 1.6;
    pen.beginPath();
    points.forEach(([x, y], i) => {
      if (i === 0) return pen.moveTo(x, y);
      const [fromX, fromY] = points[i - 1], length = Math.hypot(x - fromX, y - fromY);
      if (length < far) return pen.lineTo(x, y);
      if (Math.abs(y - fromY) < 1.5 * map.cell && Math.abs(x - fromX) > (map.columns * map.cell) / 2) return pen.moveTo(x, y);
      const bow = Math.min(0.14, 30 / length);
      pen.quadraticCurveTo((x + fromX) / 2 - (y - fromY) * bow, (y + fromY) / 2 + (x - fromX) * bow, x, y);
    });
    pen.lineJoin = pen.lineCap = "round";
    const thin = Math.max(1, Math.min(2, map.cell / 8));
    const faint = map.cell < 9 ? 0.4 : 1; // over small cells a line is about as wide as they are, and would hide them
    for (const [style, width, alpha] of [[ground, thin + 2, num > 4 ? 0.25 : 0.6], [ink, thin, num > 4 ? 0.4 : 0.75]]) {
      Object.assign(pen, { strokeStyle: style, lineWidth: width, globalAlpha: alpha * faint });
      pen.stroke();
    }
    pen.globalAlpha = 1;
    const [x, y] = points.at(-1);
    pen.fillStyle = ink;
    pen.strokeStyle = ground;
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.arc(x, y, Math.max(1.5, Math.min(3, map.cell / 6)), 0, 7);
    pen.fill();
    pen.stroke();
  }
}
