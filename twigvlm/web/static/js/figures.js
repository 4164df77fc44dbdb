// What an answer cost.

import { make } from "./dom.js";

const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(2)} s`);
const DASH = "–";

function line(term, value, told) {
  return make("div", { title: told }, make("dt", {}, term), make("dd", {}, value));
}

/** `base` are the figures of the unpruned base in the same run, or null. */
export function figuresOf(f, base) {
  const list = make("dl", { class: "figures" },
    line("first token", seconds(f.first), "from the start of the work to the first written step"),
    line("tokens a second", f.tokens_per_second === null ? DASH : f.tokens_per_second.toFixed(1), "the prompt's time included"),
    line("accepted a step", f.drafted ? f.accepted_per_step.toFixed(2) : DASH, "drafted tokens that the base accepted, on average"),
    line("cache", `${f.cache_mb.toFixed(1)} MB`, "keys and values that are filled at the end"),
    line("measured R", f.visual_measured.toFixed(1), "visual tokens that entered a layer, on average"));
  return make("div", { class: "told" }, times(f, base), list, split(f.split));
}

function times(f, base) {
  const known = base && base.tokens_per_second && f.tokens_per_second;
  const value = known ? `${(f.tokens_per_second / base.tokens_per_second).toFixed(2)}×` : DASH;
  return make("p", { class: "times" }, value, make("small", {}, known ? "the unpruned speed" : "the unpruned speed (add unpruned to compare)"));
}

function split(parts) {
  const names = ["prefill", "draft", "verify"];
  const bar = make("div", { class: "split-bar" }, ...names.map((name) => {
    const part = make("i", { class: `split-${name}` });
    part.style.flexGrow = String(parts[name]);
    return part;
  }));
  const key = make("div", { class: "split-key" }, ...names.map((name) =>
    make("span", {}, make("i", { class: `split-${name}` }), `${name} ${seconds(parts[name])}`)));
  return make("div", { class: "split", role: "group", "aria-label": "Where the time went" }, bar, key);
}
