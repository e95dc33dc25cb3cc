// The one stream that everything on the right is drawn from, and what it has come to so far.
import { ask, events } from "./api.js";

const FIRST_RETRY_MS = 500, LONGEST_RETRY_MS = 10000, SILENCE_MS = 20000;

export class Feed extends EventTarget {
  constructor() {
    super();
    this.states = new Uint8Array(0); // of each page: its place in names, 8 where it is pinned, 16 where it lies on disk too
    this.names = [];
    this.rows = new Map(); // sequence -> what is known of it
    this.paths = new Map(); // sequence -> its pages, a list for each group of layers
    this.message = { status: "connecting", counts: {}, rows: [] };
  }

  // Connect, and again whenever the line breaks; a second call starts over, with the key there is now.
  async start() {
    this.stopping?.abort();
    const stopping = (this.stopping = new AbortController());
    let wait = FIRST_RETRY_MS;
    while (!stopping.signal.aborted) {
      let silence;
      const line = new AbortController();
      stopping.signal.addEventListener("abort", () => line.abort(), { signal: line.signal });
      const listen = () => { clearTimeout(silence); silence = setTimeout(() => line.abort(), SILENCE_MS); };
      try {
        const answer = await ask("/page/events", { signal: line.signal });
        this.paths.clear();
        this.states = new Uint8Array(0);
        listen();
        for await (const data of events(answer)) {
          listen();
          wait = FIRST_RETRY_MS;
          this.take(JSON.parse(data));
        }
        this.tell({ status: "reconnecting" });
      } catch (error) {
        if (stopping.signal.aborted) return;
        if (error.status === 401) return this.tell({ status: "refused" }); // until there is another key
        this.tell({ status: "reconnecting" });
      } finally {
        clearTimeout(silence);
        line.abort();
      }
      await new Promise((resume) => setTimeout(resume, wait));
      wait = Math.min(wait * 2, LONGEST_RETRY_MS);
    }
  }

  take(message) {
    let changed = [];
    if (message.full) {
      this.names = message.names;
      this.states = Uint8Array.from(atob(message.full), (c) => c.charCodeAt(0));
      changed = null; // all
    }
    const delta = message.delta ?? [];
    for (let i = 0; i < delta.length; i += 3) {
      this.states.fill(delta[i + 2], delta[i], delta[i] + delta[i + 1]);
      for (let page = delta[i]; changed && page < delta[i] + delta[i + 1]; page++) changed.push(page);
    }
    for (const [k, groups] of Object.entries(message.paths ?? {})) this.#extend(Number(k), groups);
    this.rows = new Map((message.rows ?? []).map(([k, id, index, prompt, known, committed, waits]) =>
      [k, { k, id, index, prompt, known, committed, waits, pages: this.paths.get(k) }]));
    for (const k of this.paths.keys()) if (!this.rows.has(k)) this.paths.delete(k);
    this.tell(message, changed);
  }

  tell(message, changed = []) {
    this.message = { counts: {}, rows: [], ...message };
    this.dispatchEvent(new CustomEvent("news", { detail: { message: this.message, changed } }));
  }

  // The sequences that go through a page.
  holders(page) {
    return [...this.rows.values()].filter((row) => row.pages?.some((pages) => pages?.includes(page)));
  }

  #extend(k, groups) {
    const pages = this.paths.get(k) ?? [];
    for (const [g, news] of Object.entries(groups)) pages[g] = news.all ?? [...(pages[g] ?? []), ...news.add];
    this.paths.set(k, pages);
  }
}

// What a sequence is called: the beginning of its request's id is enough for the eye.
export const nameOf = ({ id, index, k }) => {
  if (!id) return `sequence ${k} of another key`;
  const short = id.length > 14 ? id.slice(0, 12) : id;
  return `${short}${index ? `, choice ${index}` : ""}`;
};
