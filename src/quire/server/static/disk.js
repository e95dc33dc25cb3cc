// Below the pool: the pages that lie on disk alone, as cells like those above. They have no places, only a number.
import { changed as themeChanged, colour } from "./theme.js";

const MOST_ROWS = 3;

export class DiskStrip {
  constructor(box, canvas, said, map, feed) {
    Object.assign(this, { box, canvas, said, map, shown: "" });
    feed.addEventListener("news", ({ detail: { message } }) => { if (message.status === "ready") this.update(message.disk); });
    map.relaid.addEventListener("relaid", () => this.#draw());
    themeChanged.addEventListener("theme", () => this.#draw());
  }

  update(disk) {
    const now = JSON.stringify(disk ?? null);
    if (now === this.shown) return;
    this.shown = now;
    this.disk = disk;
    this.box.hidden = !disk;
    this.#draw();
  }

  #draw() {
    const { disk, map } = this;
    if (!disk || !map.columns) return;
    const columns = Math.max(1, Math.floor(this.box.clientWidth / map.cell)), each = Math.max(1, Math.ceil(disk.only / (columns * MOST_ROWS)));
    const num = Math.ceil(disk.only / each), side = map.cell - map.gap, pen = this.canvas.getContext("2d");
    const sizes = { width: Math.min(num, columns) * map.cell, height: Math.ceil(num / columns) * map.cell };
    for (const [name, length] of Object.entries(sizes)) {
      this.canvas[name] = Math.round(length * map.ratio);
      this.canvas.style[name] = `${length}px`;
    }
    pen.setTransform(map.ratio, 0, 0, map.ratio, 0, 0);
    pen.fillStyle = colour("disk");
    pen.beginPath();
    for (let i = 0; i < num; i++) pen.roundRect((i % columns) * map.cell, Math.floor(i / columns) * map.cell, side, side, map.cell >= 9 ? Math.min(3, side / 5) : 0);
    pen.fill();
    this.canvas.hidden = !num;
    const pages = (count) => `${count.toLocaleString()} ${count === 1 ? "page" : "pages"}`;
    this.said.textContent = `${pages(disk.only)} on disk only${each > 1 ? `, ${each.toLocaleString()} a cell` : ""}; ${pages(disk.also)} above, with a green foot, there as well`;
  }
}
