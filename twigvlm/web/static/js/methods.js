// Up to four methods, each with drafts or without.

import { plan } from "./api.js";
import { byId, fault, make } from "./dom.js";
import { MOST_METHODS, UNPRUNED } from "./settings.js";

export function methodsField(about, onChange) {
  const list = byId("chips"), input = byId("add"), button = byId("add-button");
  const hint = byId("method-hint"), wrong = byId("method-fault");
  const known = new Map(about.methods.map((method) => [method.name, method]));
  let methods = [];
  byId("catalogue").replaceChildren(
    make("option", { value: UNPRUNED }, "all visual tokens"),
    ...about.methods.map((m) => make("option", { value: m.name }, `${m.summary}${m.possible ? "" : " (needs a twig)"}`)));

  const same = (a, b) => a.spec === b.spec && a.drafts === b.drafts;

  function set(found) {
    methods = found;
    list.replaceChildren(...methods.map(chip));
    byId("methods-count").textContent = `${methods.length} of ${MOST_METHODS}`;
    input.disabled = button.disabled = methods.length >= MOST_METHODS;
  }

  function change(found) {
    set(found);
    onChange(found);
  }

  function chip(method, i) {
    const drafts = make("label", { class: "check" },
      make("input", {
        type: "checkbox", checked: method.drafts, disabled: !about.twig, "aria-label": `${method.spec} with drafts`,
        onchange: (event) => change(methods.map((m, k) => (k === i ? { ...m, drafts: event.target.checked } : m))),
      }), "drafts");
    const remove = make("button", {
      type: "button", "aria-label": `Remove ${method.spec}`,
      onclick: () => {
        change(methods.filter((_, k) => k !== i));
        (list.querySelector("button") || input).focus();
      },
    }, "×");
    const about_ = known.get(method.spec.split(":")[0]);
    return make("li", { class: "chip", title: about_?.summary }, make("span", { class: "chip-name" }, method.spec), drafts, remove);
  }

  async function add() {
    const spec = input.value.trim();
    if (!spec || methods.length >= MOST_METHODS) return;
    const drafts = about.twig && spec !== UNPRUNED;
    const made = methods.some((m) => same(m, { spec, drafts })) ? { spec, drafts: !drafts && about.twig } : { spec, drafts };
    if (methods.some((m) => same(m, made))) {
      fault(wrong, `${spec} is there already; add it with other settings, or another method.`);
      return;
    }
    try {
      if (spec !== UNPRUNED) await plan(spec, about.V);
    } catch (error) {
      fault(wrong, error.message);
      return;
    }
    fault(wrong, "");
    input.value = hint.textContent = "";
    change([...methods, made]);
    if (!input.disabled) input.focus();
  }

  button.addEventListener("click", add);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      add();
    }
  });
  input.addEventListener("input", () => {
    const found = known.get(input.value.trim().split(":")[0]);
    const settings = found?.settings.length ? ` Settings: ${found.settings.join(", ")}.` : "";
    hint.textContent = found ? `${found.summary}; acts ${found.acts}.${settings}` : "";
    fault(wrong, "");
  });
  return { set };
}
