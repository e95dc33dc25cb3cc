// Puts the page together.
import { key } from "./api.js";
import { DiskStrip } from "./disk.js";
import { Feed } from "./feed.js";
import { CacheMap } from "./map.js";
import { Numbers } from "./numbers.js";
import { Paths } from "./paths.js";
import { Playground } from "./playground.js";
import * as theme from "./theme.js";
import { Timeline } from "./timeline.js";
import { Tip } from "./tip.js";

const $ = (id) => document.getElementById(id);
const SAID = { refused: "needs an API key", loading: "loading the model", dead: "the engine has failed" };

theme.start($("theme"));
theme.drawMark($("mark"), $("icon"));
const feed = new Feed(), map = new CacheMap($("map"), $("cells"), feed), paths = new Paths($("paths"), map, $("follow"), feed);
new Tip($("map"), $("tip"), $("tip-said"), map, paths, feed);
new DiskStrip($("disk"), $("disk-cells"), $("disk-said"), map, feed);
new Numbers($("numbers"), $("legend"), $("map-size"), feed);
new Timeline($("timeline"), $("timeline-hint"), feed);
const playground = new Playground();

let modelsOf = null; // the key whose models are listed
feed.addEventListener("news", ({ detail: { message } }) => {
  const status = $("status");
  if (status.dataset.status !== message.status) {
    status.dataset.status = message.status;
    status.textContent = SAID[message.status] ?? message.status;
    $("key").placeholder = message.status === "refused" ? "required" : "";
    $("key").ariaInvalid = `${message.status === "refused"}`;
  }
  if (message.model && $("model").textContent !== message.model) $("model").textContent = message.model;
  if (message.status === "ready" && modelsOf !== key.get()) {
    modelsOf = key.get();
    playground.loadModels().catch(() => (modelsOf = null));
  }
});

$("key").value = key.get();
const takeKey = () => {
  if ($("key").value.trim() === key.get()) return;
  key.set($("key").value.trim());
  feed.start();
};
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); takeKey(); });
$("key").addEventListener("change", takeKey);

window.quire = { feed, map }; // for tests, and for the curious
feed.start();
