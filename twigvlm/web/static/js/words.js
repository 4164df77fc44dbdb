// An answer, word by word, with where each word comes from.

import { calm, make } from "./dom.js";

const FLASH = 700; // milliseconds that a rejected draft is seen

export class Words {
  constructor(name, flashes) {
    this.flashes = flashes; // whether rejected drafts are shown
    this.spans = [];
    this.at = null;
    this.detail = make("p", { class: "detail", "aria-live": "polite" });
    this.place = make("p", { class: "answer", tabindex: "0", role: "group", "aria-label": `${name}: the answer; arrow keys walk word by word` });
    this.place.addEventListener("pointerover", (event) => this.point(this.spans.indexOf(event.target.closest(".word"))));
    this.place.addEventListener("pointerleave", () => this.point(-1));
    this.place.addEventListener("blur", () => this.point(-1));
    this.place.addEventListener("keydown", (event) => this.walk(event));
  }

  clear() {
    this.spans = [];
    this.at = null;
    this.place.replaceChildren();
    this.detail.textContent = "";
  }

  empty(text) {
    this.clear();
    this.place.append(make("span", { class: "empty" }, text));
  }

  /** Write a step. `index` counts from 1. */
  step(step, index) {
    const made = step.pieces.map((piece) => this.span(piece, step, index));
    const own = made.findIndex((span) => !span.classList.contains("drafted"));
    const before = own < 0 ? null : made[own];
    this.place.append(...made);
    this.flash(step, before);
    return made;
  }

  rest(pieces) {
    this.place.append(...pieces.map((piece) => this.span(piece, null, 0)));
  }

  span(piece, step, index) {
    const span = make("span", { class: piece.drafted ? "word drafted" : "word" });
    const space = piece.drafted && !this.spans.at(-1)?.classList.contains("drafted") ? piece.text.match(/^\s*/)[0] : "";
    span.append(space, piece.drafted ? make("u", {}, piece.text.slice(space.length)) : piece.text); // no line under a gap before
    span.told = this.tell(piece, step, index);
    this.spans.push(span);
    return span;
  }

  tell(piece, step, index) {
    const words = [`“${piece.text.trim() || "␠"}”`];
    if (piece.drafted) words.push(`drafted, ${percent(piece.probability)} sure`, `the base ${percent(piece.believed)}`);
    else words.push(`the base's own, ${percent(piece.believed)} sure`);
    if (step) {
      words.push(`step ${index}, ${step.accepted} of ${step.drafted} right`);
      if (step.rejected.length) words.push(`rejected “${step.rejected.map((r) => r.text).join("").trim()}”`);
    }
    return words.join(" · ");
  }

  /** Rejected drafts stand for a moment where they would have stood. */
  flash(step, before) {
    if (!this.flashes() || !step.rejected.length || calm.matches) return;
    const ghost = make("span", { class: "rejected", "aria-hidden": "true" }, step.rejected.map((r) => r.text).join(""));
    this.place.insertBefore(ghost, before);
    setTimeout(() => ghost.remove(), FLASH);
  }

  point(index) {
    if (this.at !== null) this.spans[this.at]?.classList.remove("at");
    this.at = index >= 0 && index < this.spans.length ? index : null;
    this.spans[this.at]?.classList.add("at");
    this.detail.textContent = this.at === null ? "" : this.spans[this.at].told;
  }

  walk(event) {
    const last = this.spans.length - 1, now = this.at ?? -1;
    const moves = { ArrowRight: Math.min(now + 1, last), ArrowDown: Math.min(now + 1, last), ArrowLeft: Math.max(now - 1, 0), ArrowUp: Math.max(now - 1, 0), Home: 0, End: last };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    this.point(moves[event.key]);
  }

  get text() {
    return this.spans.map((span) => span.textContent).join("");
  }
}

// The last letters of an unfinished character have no step of their own, and so no share.
const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(share > 0.995 ? 1 : 0)} %`);
