// R: a slider that snaps to the papers' budgets, a number for all others, and what each method makes of it.

import { plan } from "./api.js";
import { byId, make, settled } from "./dom.js";
import { UNPRUNED } from "./settings.js";

const REACH = 0.012; // of the slider's length: as near as this a snap is met
const PLAN_WAIT = 90; // milliseconds after the last change

/** A third, two ninths and a ninth of all: 192, 128 and 64 of 576. */
export const snapsOf = (V) => [...new Set([V / 3, (2 * V) / 9, V / 9].map(Math.round))].filter((R) => R >= 1);

export function budgetField(about, onChange) {
  const slider = byId("budget"), number = byId("budget-number"), place = byId("schedules");
  const snaps = snapsOf(about.V);
  let dragged = false, asked = 0;
  slider.min = number.min = 1;
  slider.max = number.max = about.V;
  byId("snaps").replaceChildren(...snaps.map((R) => make("option", { value: R })));
  const buttons = snaps.map((R) => make("button", { type: "button", "aria-pressed": "false", onclick: () => change(R) }, String(R)));
  byId("snap-buttons").replaceChildren(...buttons);

  function set(R) {
    slider.value = R;
    slider.setAttribute("aria-valuetext", `${R} visual tokens a layer`);
    if (Number(number.value) !== R || number.value === "") number.value = R;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(snaps[i] === R)));
  }

  function change(R) {
    set(R);
    onChange(R);
  }

  slider.addEventListener("pointerdown", () => { dragged = true; });
  for (const kind of ["pointerup", "pointercancel", "keydown"]) slider.addEventListener(kind, () => { dragged = false; });
  slider.addEventListener("input", () => {
    const R = Number(slider.value);
    const near = snaps.find((snap) => Math.abs(snap - R) <= REACH * about.V);
    change(dragged && near !== undefined ? near : R);
  });
  number.addEventListener("input", () => {
    const R = Number(number.value);
    if (number.value !== "" && Number.isFinite(R) && R >= 0) change(R);
  });

  const ask = settled(async (methods, R) => {
    const mine = ++asked;
    const specs = [...new Set(methods.map((m) => m.spec).filter((spec) => spec !== UNPRUNED))];
    const found = await Promise.all(specs.map((spec) => plan(spec, R).catch((error) => ({ reason: error.message }))));
    if (mine === asked) place.replaceChildren(...specs.map((spec, i) => schedule(spec, found[i])));
  }, PLAN_WAIT);

  function schedule(spec, found) {
    const name = make("b", {}, spec);
    if (found.reason) return make("div", { class: "schedule", data: { spec } }, name, make("p", { class: "fault" }, found.reason));
    const bars = found.layers.map((tokens) => {
      const bar = make("i");
      bar.style.height = `${(100 * tokens) / about.V}%`;
      return bar;
    });
    const words = `${spec}: tokens by layer ${found.text}`;
    return make("div", { class: "schedule", data: { spec, layers: found.layers.join(" ") } },
      make("div", { class: "schedule-head" }, name, make("span", {}, found.text)),
      make("div", { class: "bars", role: "img", "aria-label": words, title: words }, ...bars));
  }

  return { set, schedules: ask };
}
