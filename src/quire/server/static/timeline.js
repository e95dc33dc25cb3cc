// Requests over the last half minute: queued, prefill, decode. Drawn when news come, so an idle page draws nothing.
import { nameOf } from "./feed.js";
import { changed as themeChanged, colour } from "./theme.js";

const SHOWN_S = 30, LANE = 20, BAR = 12, AXIS = 20, KEPT = 400;

export class Timeline {
  constructor(canvas, hint, feed) {
    Object.assign(this, { canvas, hint, feed, bars: new Map(), ended: [], lanes: [], at: 0 });
    feed.addEventListener("news", ({ detail: { message } }) => { if (message.status === "ready") this.update(message.at); });
    themeChanged.addEventListener("theme", () => this.soon());
    new ResizeObserver(() => this.soon()).observe(canvas);
  }

  update(at) {
    this.at = at;
    for (const row of this.feed.rows.values()) {
      const phase = row.waits !== null ? "queued" : row.committed < row.prompt ? "prefill" : "decode";
      let bar = this.bars.get(row.k);
      if (!bar) this.bars.set(row.k, (bar = { name: nameOf(row), own: Boolean(row.id), lane: this.#lane(row.k), phases: [] }));
      const last = bar.phases.at(-1);
      if (last?.phase === phase) last.to = at;
      else {
        if (last) last.to = at;
        bar.phases.push({ phase, from: at, to: at });
      }
      Object.assign(bar, { committed: row.committed, known: row.known });
    }
    for (const [k, bar] of this.bars) {
      if (this.feed.rows.has(k)) continue;
      bar.phases.at(-1).to = at;
      this.bars.delete(k);
      this.ended.push(bar);
      if (bar.lane >= 0) this.lanes[bar.lane] = { until: at + 0.4 };
    }
    this.ended = this.ended.filter((bar) => bar.phases.at(-1).to > at - SHOWN_S).slice(-KEPT);
    this.soon();
  }

  soon() {
    this.waiting ??= requestAnimationFrame(() => { this.waiting = undefined; this.#draw(); });
  }

  #lane(k) {
    const most = Math.floor((this.canvas.clientHeight - AXIS) / LANE);
    for (let lane = 0; lane < most; lane++) {
      const taken = this.lanes[lane];
      if (taken && (taken.k !== undefined || taken.until > this.at)) continue;
      this.lanes[lane] = { k };
      return lane;
    }
    return -1;
  }

  #draw() {
    const { canvas } = this, pen = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const x = (s) => width - ((this.at - s) / SHOWN_S) * width, soft = colour("soft");
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.strokeStyle = colour("line");
    for (let s = 0; s <= SHOWN_S; s += width < 400 ? 10 : 5) {
      const at = Math.min(width - 0.5, Math.max(0.5, Math.round(x(this.at - s)) + 0.5));
      pen.beginPath();
      pen.moveTo(at, 0);
      pen.lineTo(at, height - AXIS);
      pen.stroke();
      pen.fillStyle = soft;
      pen.textAlign = s === 0 ? "right" : s === SHOWN_S ? "left" : "center";
      pen.fillText(s ? `−${s} s` : "now", at, height - AXIS / 2 + 2);
    }
    const bars = [...this.ended, ...this.bars.values()].filter((bar) => bar.lane >= 0);
    for (const bar of bars) this.#bar(pen, bar, x);
    pen.textAlign = "left";
    for (const bar of bars) this.#label(pen, bar, x, width);
    const hidden = [...this.bars.values()].filter((bar) => bar.lane < 0).length, open = this.bars.size;
    const text = `${open ? `${open} open` : "none open"}${hidden ? `, ${hidden} not shown` : ""}`;
    if (this.hint.textContent !== text) this.hint.textContent = text;
  }

  #bar(pen, bar, x) {
    const y = bar.lane * LANE + (LANE - BAR) / 2;
    pen.save();
    pen.beginPath();
    const from = Math.max(0, x(bar.phases[0].from)), to = Math.max(from + 3, x(bar.phases.at(-1).to));
    pen.roundRect(from, y, to - from, BAR, 3);
    pen.clip();
    for (const { phase, from, to } of bar.phases) {
      pen.fillStyle = colour(phase);
      pen.globalAlpha = bar.own ? 1 : 0.5;
      pen.fillRect(x(from), y, Math.max(3, x(to) - x(from)), BAR);
    }
    pen.restore();
  }

  #label(pen, bar, x, width) {
    const from = Math.max(0, x(bar.phases[0].from)), to = x(bar.phases.at(-1).to), text = bar.own ? bar.name : "another key";
    const short = text.length > 26 ? `${text.slice(0, 24)}…` : text, long = pen.measureText(short).width;
    pen.fillStyle = colour("soft");
    const y = bar.lane * LANE + LANE / 2;
    if (to + 6 + long < width && !this.#follows(bar, x, to + 10 + long)) pen.fillText(short, to + 6, y);
    else if (from - 6 - long > 0) pen.fillText(short, from - 6 - long, y);
    else if (to - from > long + 14) {
      pen.fillStyle = colour("panel");
      pen.fillText(short, from + 7, y);
    }
  }

  #follows(bar, x, until) {
    return [...this.ended, ...this.bars.values()].some((other) => other !== bar && other.lane === bar.lane
      && x(other.phases[0].from) < until && other.phases[0].from >= bar.phases.at(-1).to);
  }
}
