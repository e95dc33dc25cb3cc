// The API's own page: every address and every object of /openapi.json, and nothing that is not in it.
import { ask, key } from "./api.js";
import * as theme from "./theme.js";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
};
const nameOf = (ref) => ref.split("/").pop();
const words = (text) => (text ?? "").replaceAll("`", "");
const BOUNDS = [["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"]];
const SIZES = [["Length", "characters"], ["Items", "entries"], ["Properties", "fields"]];
const PLURALS = { string: "strings", integer: "integers", number: "numbers", object: "objects", boolean: "booleans", any: "anything" };
const number = (value) => { // large limits are powers of two, of which JSON's digits are not all read
  const power = Math.log2(Math.abs(value));
  return Math.abs(value) > 1e6 && Number.isInteger(power) ? `${value < 0 ? "-" : ""}2^${power}` : value.toLocaleString("en");
};

function limits(schema) {
  const told = BOUNDS.filter(([name]) => schema[name] !== undefined).map(([name, sign]) => `${sign} ${number(schema[name])}`);
  for (const [name, unit] of SIZES) {
    const [least, most] = [schema[`min${name}`], schema[`max${name}`]];
    if (least === 1 && most === undefined) told.push("not empty");
    else if (least || most !== undefined) told.push(`${[least && `at least ${number(least)}`, most !== undefined && `at most ${number(most)}`].filter(Boolean).join(", ")} ${unit}`);
  }
  return told.length ? ` (${told.join(", ")})` : "";
}

// What a value may be, as text and as links to the objects named in it.
function kind(schema) {
  if (schema.$ref) return [make("a", { href: `#${nameOf(schema.$ref)}`, textContent: nameOf(schema.$ref) })];
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return options.flatMap((one, i) => [...(i ? [" or "] : []), ...kind(one)]);
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map((one) => JSON.stringify(one)).join(" or ")];
  if (schema.contentSchema) return ["JSON: ", ...kind(schema.contentSchema)];
  if (schema.type === "array") {
    const inner = kind(schema.items ?? {});
    return ["array of ", ...(inner.length > 1 ? ["(", ...inner, ")"] : inner.map((one) => PLURALS[one] ?? one)), limits(schema)].filter(Boolean);
  }
  if (schema.type === "object" && schema.properties) return ["{ ", ...Object.entries(schema.properties).flatMap(([name, one], i) => [`${i ? ", " : ""}${name}: `, ...kind(one)]), " }"];
  if (schema.type === "object" && typeof schema.additionalProperties === "object") return ["object of ", ...kind(schema.additionalProperties).map((one) => PLURALS[one] ?? one), limits(schema)].filter(Boolean);
  return [`${schema.type ?? "any"}${limits(schema)}`];
}

function fields(schema) {
  const required = new Set(schema.required);
  return make("table", {}, make("tbody", {}, ...Object.entries(schema.properties ?? {}).map(([name, one]) => make("tr", {},
    make("td", {}, make("code", { textContent: name }), required.has(name) ? make("span", { className: "must", textContent: " required" }) : null),
    make("td", { className: "kind" }, ...kind(one)),
    make("td", { textContent: words(one.description) + (one.default !== undefined ? ` ${JSON.stringify(one.default)} where not given.` : "") })))));
}

const entry = (id, head, ...inside) => make("details", { className: "entry", id }, make("summary", {}, ...head), make("div", { className: "inside" }, ...inside));
const firstLine = (text) => words(text).split("\n")[0];

function operation(path, method, told, open, schemas) {
  const inside = words(told.description) === firstLine(told.description) ? [] : [make("p", { textContent: words(told.description) })];
  if (open) inside.push(make("p", { className: "hint", textContent: "Asks for no key." }));
  if (told.parameters?.length) {
    const properties = Object.fromEntries(told.parameters.map((one) => [one.name, { description: `In the ${one.in}.`, ...one.schema }]));
    inside.push(make("h4", { textContent: "Parameters" }), fields({ properties, required: told.parameters.filter((one) => one.required).map((one) => one.name) }));
  }
  for (const { schema } of Object.values(told.requestBody?.content ?? {})) {
    inside.push(make("h4", {}, "Body, ", make("span", { className: "kind" }, ...kind(schema))), fields(schema.$ref ? schemas[nameOf(schema.$ref)] : schema));
  }
  const answers = Object.entries(told.responses).flatMap(([status, { content, description }]) => Object.entries(content ?? {}).map(([media, one]) => make("tr", {},
    make("td", {}, make("code", { textContent: status }), ` ${media}`),
    make("td", { className: "kind" }, ...kind(one.schema ?? one.itemSchema?.properties?.data ?? one.itemSchema ?? {})),
    make("td", { textContent: one.itemSchema ? "Server-sent events, where stream is true." : words(description) }))));
  inside.push(make("h4", { textContent: "Answers" }), make("table", {}, make("tbody", {}, ...answers)));
  const head = [make("span", { className: `method ${method}`, textContent: method.toUpperCase() }), make("code", { textContent: path })];
  return entry(`${method}:${path}`, [...head, make("span", { className: "hint", textContent: firstLine(told.description) })], ...inside);
}

function object(name, schema) {
  const shape = schema.properties ? fields(schema) : make("p", { className: "kind" }, ...kind(schema));
  return entry(name, [make("code", { textContent: name }), make("span", { className: "hint", textContent: firstLine(schema.description) })], shape);
}

function show({ info, paths, components }) {
  const groups = new Map();
  for (const [path, operations] of Object.entries(paths)) for (const [method, told] of Object.entries(operations)) {
    const group = told.tags?.[0] ?? "other";
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(operation(path, method, told, told.security?.length === 0, components.schemas));
  }
  groups.set("Objects", Object.entries(components.schemas).sort(([a], [b]) => a.localeCompare(b)).map(([name, schema]) => object(name, schema)));
  $("about").textContent = `${info.title} ${info.version}. ${info.summary}. A key goes into the header "Authorization: Bearer KEY".`;
  $("routes").replaceChildren(...[...groups].map(([title, entries]) => make("section", {},
    make("h2", { textContent: title[0].toUpperCase() + title.slice(1) }), ...entries)));
  filter();
  unfoldNamed();
}

function filter() {
  const text = $("filter").value.trim().toLowerCase(), entries = [...document.querySelectorAll(".entry")];
  for (const one of entries) one.hidden = !one.textContent.toLowerCase().includes(text);
  for (const section of document.querySelectorAll("section")) section.hidden = !section.querySelector(".entry:not([hidden])");
  $("found").textContent = text ? `${entries.filter((one) => !one.hidden).length} of ${entries.length}` : "";
}

function unfoldNamed() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!named?.classList.contains("entry")) return;
  named.hidden = named.parentElement.hidden = false;
  named.open = true;
  named.scrollIntoView();
}

async function load() {
  const status = $("status");
  try {
    show(await (await ask("/openapi.json")).json());
    [status.dataset.status, status.textContent] = ["ready", ""];
  } catch (error) {
    status.dataset.status = "refused";
    status.textContent = error.status === 401 ? "needs an API key" : error.message;
  }
  $("key").ariaInvalid = `${status.dataset.status === "refused"}`;
  status.hidden = status.dataset.status === "ready";
}

theme.start($("theme"));
theme.drawMark($("mark"), $("icon"));
$("key").value = key.get();
const takeKey = () => { key.set($("key").value.trim()); load(); };
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); takeKey(); });
$("key").addEventListener("change", takeKey);
$("filter").addEventListener("input", filter);
$("unfold").addEventListener("click", () => {
  const entries = [...document.querySelectorAll(".entry")], open = entries.some((one) => !one.open);
  for (const one of entries) one.open = open;
  $("unfold").textContent = open ? "Fold all" : "Unfold all";
});
addEventListener("hashchange", unfoldNamed);
load();
