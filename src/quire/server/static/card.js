// One card: a request, its answers as they stream, what they cost, and what can be done with them.
import { ask, events } from "./api.js";
import { append, logprobsOf } from "./tokens.js";

let numbers = 0;
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

export class Card {
  constructor(cards, say, { onReply, onChange }) {
    Object.assign(this, { say, onChange, number: ++numbers, messages: [] });
    this.title = make("h3", { textContent: `${this.number}`, id: `card-${this.number}` });
    this.state = make("span", { className: "state" });
    this.stopButton = this.#button("Stop", () => this.stop());
    this.replyButton = this.#button("Reply", () => onReply(this));
    this.traceButton = this.#button("Trace", () => this.#trace());
    this.removeButton = this.#button("×", () => { this.stop(); this.element.remove(); onChange(); }, "Remove");
    this.body = make("div", { className: "body" });
    this.costs = make("footer");
    this.element = make("article", { className: "card", tabIndex: -1 },
      make("header", {}, this.title, this.state, make("span", { className: "spring" }), this.stopButton, this.replyButton, this.traceButton, this.removeButton),
      this.body, this.costs);
    this.element.setAttribute("aria-labelledby", this.title.id);
    cards.prepend(this.element);
  }

  get running() {
    return Boolean(this.stopping);
  }

  stop() {
    this.stopping?.abort();
  }

  // Send it and show what comes. `body` is the request's own; `shown` is what the user wrote.
  async run(path, body, shown) {
    const stopping = (this.stopping = new AbortController()), began = performance.now();
    const run = { began, first: null, tokens: 0, texts: [], reasons: [], usage: null };
    const choices = make("div", { className: "choices" });
    const places = Array.from({ length: body.n ?? 1 }, () => choices.appendChild(make("div", { className: "choice" })));
    this.body.append(make("div", { className: this.body.children.length ? "asked turn" : "asked", textContent: shown }), choices);
    this.title.textContent = `${this.number} ${body.messages ? "chat" : "completion"}`;
    this.element.classList.toggle("wide", places.length > 1);
    this.#running(true);
    try {
      const answer = await ask(path, { json: body, signal: stopping.signal });
      for await (const data of events(answer)) {
        if (data === "[DONE]") break;
        this.#take(JSON.parse(data), places, run);
      }
      const why = [...new Set(run.reasons.filter(Boolean))].join(", ");
      this.state.textContent = why;
      this.say(`Answer ${this.number} has ended: ${why}, ${run.tokens} tokens`);
    } catch (error) {
      const stopped = stopping.signal.aborted;
      this.state.textContent = stopped ? "stopped" : "failed";
      if (!stopped) this.body.append(make("p", { className: "error", textContent: error.message }));
      this.say(stopped ? `Answer ${this.number} stopped` : `Answer ${this.number} failed: ${error.message}`);
    } finally {
      this.stopping = undefined;
      this.#running(false);
      this.#costs(run);
    }
    if (body.messages) this.messages = [...body.messages, { role: "assistant", content: run.texts[0] ?? "" }];
  }

  #take(chunk, places, run) {
    if (chunk.error) throw new Error(chunk.error.message);
    this.id ??= chunk.id;
    run.usage = chunk.usage ?? run.usage;
    for (const choice of chunk.choices ?? []) {
      const text = choice.delta ? choice.delta.content ?? "" : choice.text, logprobs = logprobsOf(choice), place = places[choice.index];
      run.tokens += logprobs.tokens.length;
      if (text || logprobs.tokens.length) run.first ??= performance.now();
      run.texts[choice.index] = (run.texts[choice.index] ?? "") + text;
      run.reasons[choice.index] = choice.finish_reason ?? run.reasons[choice.index];
      const atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 24;
      append(place, text, logprobs);
      if (atEnd) place.scrollTop = place.scrollHeight;
    }
    this.#costs(run);
  }

  #costs({ began, first, tokens, usage }) {
    const now = performance.now(), num = usage?.completion_tokens ?? tokens, parts = [[num.toLocaleString(), num === 1 ? "token" : "tokens"]];
    if (first !== null) {
      this.lasted = this.running || !this.lasted ? now - first : this.lasted;
      if (num > 1 && this.lasted > 0) parts.push([((num - 1) / (this.lasted / 1000)).toFixed(1), "tokens/s"]);
      parts.push([`${Math.round(first - began)} ms`, "to the first"]);
    }
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (cached !== undefined) parts.push([`${cached} of ${usage.prompt_tokens}`, "prompt tokens cached"]);
    this.costs.replaceChildren(...parts.map(([value, unit]) => make("span", {}, make("b", { textContent: value }), ` ${unit}`)));
  }

  #running(now) {
    this.element.classList.toggle("running", now);
    if (now) [this.state.textContent, this.lasted] = ["running", undefined];
    this.stopButton.hidden = !now;
    this.replyButton.hidden = now || !this.title.textContent.endsWith("chat");
    this.traceButton.hidden = now || !this.id;
    this.onChange();
  }

  // The trace of the last request, for Perfetto.
  async #trace() {
    try {
      const trace = await (await ask(`/traces/${encodeURIComponent(this.id)}`)).blob(), link = make("a", { download: `${this.id}.trace.json` });
      link.href = URL.createObjectURL(trace);
      link.click();
      URL.revokeObjectURL(link.href);
    } catch (error) {
      this.say(error.message);
      this.state.textContent = error.message;
    }
  }

  #button(text, click, label) {
    const button = make("button", { type: "button", className: "quiet", textContent: text, hidden: text !== "×", onclick: click });
    button.setAttribute("aria-label", `${label ?? text} answer ${this.number}`);
    return button;
  }
}
