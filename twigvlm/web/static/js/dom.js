// Small helpers for the document. Text is always set as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `data`, `on…`, attributes) and children: nodes or text. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name === "checked" || name === "value") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function fault(place, text) {
  place.hidden = !text;
  place.textContent = text || "";
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** The last call of several, `wait` milliseconds after it. */
export function settled(call, wait) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), wait);
  };
}
