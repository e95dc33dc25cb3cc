// The composer: what is asked for, sent as often as wanted, all at once.
import { ask } from "./api.js";
import { Card } from "./card.js";

const $ = (id) => document.getElementById(id);
const KEPT = ["prompt", "system", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stop", "copies"];

export class Playground {
  constructor() {
    this.cards = [];
    this.form = $("composer");
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.form.requestSubmit(); }
    });
    for (const radio of this.form.elements.mode) radio.addEventListener("change", () => { this.#reply(null); this.#showMode(); });
    $("stop-all").addEventListener("click", () => this.cards.forEach((card) => card.stop()));
    $("shade").addEventListener("change", () => $("cards").classList.toggle("plain", !$("shade").checked));
    $("replying").querySelector("button").addEventListener("click", () => this.#reply(null));
    this.#restore();
    this.#showMode();
  }

  get chat() {
    return this.form.elements.mode.value === "chat";
  }

  async loadModels() {
    const { data } = await (await ask("/v1/models")).json();
    $("models").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  }

  send() {
    const prompt = $("prompt").value;
    if (!this.form.reportValidity() || (this.chat && !prompt.trim())) return $("prompt").focus();
    this.#keep();
    const copies = this.replyTo ? 1 : Number($("copies").value) || 1;
    for (let i = 0; i < copies; i++) this.#run(prompt);
    if (this.replyTo) $("prompt").value = "";
  }

  #run(prompt) {
    const card = this.replyTo ?? new Card($("cards"), (text) => ($("said").textContent = text), {
      onReply: (one) => this.#reply(one), onChange: () => this.#changed(),
    });
    if (!this.replyTo) this.cards.push(card);
    if (card.running) return;
    const system = $("system").value.trim(), before = this.replyTo ? card.messages : system ? [{ role: "system", content: system }] : [];
    const body = { model: $("models").value || undefined, stream: true, stream_options: { include_usage: true }, ...this.#params() };
    if (this.chat) card.run("/v1/chat/completions", { ...body, messages: [...before, { role: "user", content: prompt }], logprobs: true }, prompt);
    else card.run("/v1/completions", { ...body, prompt, logprobs: 0 }, prompt);
  }

  #params() {
    const params = {};
    for (const name of ["max_tokens", "temperature", "top_p", "top_k", "seed", "n"]) if ($(name).value !== "") params[name] = Number($(name).value);
    const stop = $("stop").value.split("|").filter(Boolean);
    if (stop.length) params.stop = stop;
    return params;
  }

  #reply(card) {
    this.replyTo = card;
    $("replying").hidden = !card;
    if (!card) return;
    $("replying").querySelector("span").textContent = `Goes on with answer ${card.number}.`;
    $("prompt").value = "";
    $("prompt").focus();
  }

  #changed() {
    this.cards = this.cards.filter((card) => card.element.isConnected);
    $("empty").hidden = this.cards.length > 0;
    $("stop-all").disabled = !this.cards.some((card) => card.running);
    if (this.replyTo && !this.replyTo.element.isConnected) this.#reply(null);
  }

  #showMode() {
    this.form.querySelector(".chat-only").hidden = !this.chat;
    $("prompt-label").textContent = this.chat ? "Message" : "Prompt";
    $("prompt").placeholder = this.chat ? "Ask something" : "Once upon a time";
  }

  #keep() {
    const kept = Object.fromEntries(KEPT.map((name) => [name, $(name).value]));
    sessionStorage.setItem("quire.composer", JSON.stringify({ ...kept, mode: this.form.elements.mode.value }));
  }

  #restore() {
    const kept = JSON.parse(sessionStorage.getItem("quire.composer") ?? "{}");
    for (const name of KEPT) if (kept[name] !== undefined) $(name).value = kept[name];
    if (kept.mode) this.form.elements.mode.value = kept.mode;
  }
}
