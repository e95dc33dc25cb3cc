// What is known of the page under the pointer, or under the keyboard's frame. Its tokens are asked for only now, and told only to their owner.
import { ask } from "./api.js";
import { nameOf } from "./feed.js";
import { ON_DISK, PINNED, STATE } from "./map.js";

const PATIENCE_MS = 90;
const SAID = {
  free: "Holds nothing.",
  held: "Held by one sequence.",
  shared: "Held by several sequences at once.",
  cached: "Nobody holds it; whoever has its prefix may take it.",
  pinned: "Nobody holds it; it is pinned, so it stays.",
  moving: "On its way to the disk or from there.",
  retired: "Its memory was given back to the system.",
};

export class Tip {
  constructor(box, tip, said, map, paths, feed) {
    Object.assign(this, { box, tip, said, map, paths, feed, page: -1 });
    box.addEventListener("pointermove", (event) => {
      const at = map.canvas.getBoundingClientRect();
      this.look(map.pageAt(event.clientX - at.left, event.clientY - at.top));
    });
    box.addEventListener("pointerleave", () => this.look(-1));
    box.addEventListener("blur", () => this.look(-1));
    box.addEventListener("keydown", (event) => this.#key(event));
    feed.addEventListener("news", () => { if (this.page >= 0 && this.state !== feed.states[this.page]) this.#show(false); });
  }

  look(page, aloud = false) {
    if (page === this.page) return;
    this.page = page;
    this.paths.look(page);
    this.tip.hidden = page < 0;
    if (page >= 0) this.#show(aloud);
  }

  #key(event) {
    const { columns } = this.map, last = this.feed.states.length - 1;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.look(-1);
    if (step === undefined || last < 0) return;
    event.preventDefault();
    this.look(Math.max(0, Math.min(last, this.page < 0 ? 0 : this.page + step)), true);
  }

  async #show(aloud) {
    const { page, feed } = this, state = (this.state = feed.states[page]), name = feed.names[state & STATE];
    const marks = `${state & PINNED && name !== "pinned" ? " Pinned." : ""}${state & ON_DISK ? " Its content lies on disk too." : ""}`;
    const holders = feed.holders(page).map((row) => `${nameOf(row)}${this.#stored(row)}`), lines = [SAID[name] + marks];
    if (holders.length) lines.push(holders.slice(0, 4).join(", ") + (holders.length > 4 ? ` and ${holders.length - 4} more` : ""));
    this.#fill(`Page ${page.toLocaleString()}: ${name}`, lines);
    if (aloud) this.said.textContent = `Page ${page}, ${name}.${marks} ${holders.join(", ")}`;
    if (name === "free" || name === "retired") return;
    await new Promise((resume) => setTimeout(resume, PATIENCE_MS));
    if (this.page !== page) return;
    const known = await ask(`/page/cache/${page}`).then((answer) => answer.json()).catch(() => null);
    if (this.page !== page || !known || this.state !== state) return;
    if (known.tokens === null) lines.push("Its tokens are not this key's to see.");
    else lines.push(`Tokens ${known.position.toLocaleString()} to ${(known.position + known.tokens - 1).toLocaleString()} of its sequence`);
    this.#fill(`Page ${page.toLocaleString()}: ${known.state}`, lines, known.text);
    if (aloud && known.text) this.said.textContent += ` Text: ${known.text}`;
  }

  // How many of a sequence's pages lie on disk too, where there is a disk.
  #stored(row) {
    if (!this.feed.message.disk) return "";
    const pages = row.pages.flat();
    return ` (${pages.filter((page) => this.feed.states[page] & ON_DISK).length} of its ${pages.length} pages on disk too)`;
  }

  #fill(title, lines, text) {
    const make = (tag, content) => Object.assign(document.createElement(tag), { textContent: content });
    this.tip.replaceChildren(make("h4", title), ...lines.map((line) => make("p", line)), ...(text ? [make("pre", text)] : []));
    const at = this.map.canvas.getBoundingClientRect(), [x, y] = this.map.place(this.page), size = this.tip.getBoundingClientRect();
    const left = at.left + x + 14, top = at.top + y + 14;
    this.tip.style.left = `${Math.max(8, left + size.width > innerWidth - 8 ? left - size.width - 28 : left)}px`;
    this.tip.style.top = `${Math.max(8, top + size.height > innerHeight - 8 ? top - size.height - 28 : top)}px`;
  }
}
