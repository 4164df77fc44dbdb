// The picture as the model sees it, patch by patch: what was dropped is dark; or a heat map of the scores.

import { make } from "./dom.js";

const PIXELS = 480; // of the canvas, at least
const DARK = "rgba(10, 13, 12, 0.8)";
// From low to high, readable with any kind of colour vision (dark blue, grey, yellow).
const HEAT = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(at), HEAT.length - 2);
  const mixed = HEAT[low].map((value, i) => Math.round(value + (HEAT[low + 1][i] - value) * (at - low)));
  return `rgba(${mixed.join(",")}, 0.82)`;
}

/** Where each score stands between the lowest and the highest, by their logarithms: attention is many small numbers. */
function shares(scores) {
  const given = scores.filter((score) => score !== null && score > 0);
  if (!given.length) return scores.map(() => null);
  const logs = given.map(Math.log).sort((a, b) => a - b);
  const low = logs[Math.floor(logs.length * 0.02)], high = logs[logs.length - 1];
  return scores.map((score) => (score === null ? null : score > 0 ? (Math.log(score) - low) / (high - low || 1) : 0));
}

export class Patches {
  constructor(visual, name) {
    this.side = Math.floor(Math.sqrt(visual));
    this.first = visual - this.side ** 2; // a class token that counts among them stands before
    this.cell = Math.max(8, Math.ceil(PIXELS / this.side));
    this.kept = null;
    this.scores = null;
    this.ranks = [];
    this.heat = false;
    this.at = null;
    this.name = name;
    this.detail = make("p", { class: "detail", "aria-live": "polite" });
    this.canvas = make("canvas", {
      class: "patches", width: this.side * this.cell, height: this.side * this.cell, tabindex: "0", role: "img",
      "aria-label": `${name}: the picture, ${this.side} by ${this.side} patches; arrow keys walk`,
    });
    this.image = new Image();
    this.image.addEventListener("load", () => this.draw());
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => this.point(this.under(event)));
    canvas.addEventListener("pointerdown", (event) => this.point(this.under(event)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) this.point(this.at ?? 0); });
    canvas.addEventListener("keydown", (event) => this.walk(event));
    this.say();
  }

  show(address) {
    this.image.src = address;
  }

  /** What a method kept (null: all) and the score that it gave each visual token (null: none). */
  set(kept, scores) {
    this.kept = kept === null ? null : new Set(kept.map((index) => index - this.first));
    this.scores = scores === null ? null : scores.slice(this.first);
    this.shares = this.scores && shares(this.scores);
    this.ranks = [];
    if (this.scores) {
      const order = this.scores.map((score, i) => [score, i]).filter(([score]) => score !== null).sort((a, b) => b[0] - a[0]);
      order.forEach(([, i], rank) => { this.ranks[i] = rank + 1; });
    }
    const count = this.kept ? [...this.kept].filter((index) => index >= 0).length : this.side ** 2;
    this.canvas.dataset.kept = this.kept ? [...this.kept].sort((a, b) => a - b).join(" ") : "all";
    this.canvas.setAttribute("aria-label", `${this.name}: ${count} of ${this.side ** 2} patches kept; arrow keys walk`);
    this.draw();
    this.say();
  }

  setHeat(on) {
    this.heat = on;
    this.draw();
    this.say();
  }

  draw() {
    const paint = this.canvas.getContext("2d"), { side, cell } = this;
    paint.clearRect(0, 0, side * cell, side * cell);
    if (this.image.complete && this.image.naturalWidth) paint.drawImage(this.image, 0, 0, side * cell, side * cell);
    const hot = this.heat && this.shares;
    for (let i = 0; i < side ** 2; i++) {
      const x = (i % side) * cell, y = Math.floor(i / side) * cell, kept = !this.kept || this.kept.has(i);
      if (hot && this.shares[i] !== null) {
        paint.fillStyle = colour(this.shares[i]);
        paint.fillRect(x, y, cell, cell);
        if (kept && this.kept) {
          paint.strokeStyle = "rgba(255, 255, 255, 0.9)";
          paint.lineWidth = 1.5;
          paint.strokeRect(x + 1.5, y + 1.5, cell - 3, cell - 3);
        }
      } else if (!kept) {
        paint.fillStyle = DARK;
        paint.fillRect(x, y, cell, cell);
      }
    }
    if (this.at !== null) this.frame(paint);
  }

  frame(paint) {
    const { side, cell } = this, x = (this.at % side) * cell, y = Math.floor(this.at / side) * cell;
    paint.lineWidth = 4;
    paint.strokeStyle = "#000";
    paint.strokeRect(x - 1, y - 1, cell + 2, cell + 2);
    paint.lineWidth = 2;
    paint.strokeStyle = "#fff";
    paint.strokeRect(x - 1, y - 1, cell + 2, cell + 2);
  }

  under(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.side);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.side);
    const inside = column >= 0 && row >= 0 && column < this.side && row < this.side;
    return inside ? row * this.side + column : null;
  }

  point(index) {
    if (index === this.at) return;
    this.at = index;
    this.draw();
    this.say();
  }

  walk(event) {
    const { side } = this, now = this.at ?? 0, column = now % side;
    const moves = {
      ArrowLeft: column > 0 ? now - 1 : now,
      ArrowRight: column < side - 1 ? now + 1 : now,
      ArrowUp: now >= side ? now - side : now,
      ArrowDown: now < side * (side - 1) ? now + side : now,
      Home: 0,
      End: side ** 2 - 1,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.point(moves[event.key]);
  }

  say() {
    const { side, at } = this, all = this.scores?.filter((score) => score !== null).length;
    if (at === null) {
      const none = this.kept && !this.scores ? "this method gives no score to single patches" : "";
      this.detail.textContent = this.heat && none ? none : "";
      return;
    }
    const words = [`row ${Math.floor(at / side) + 1}, column ${(at % side) + 1}`];
    if (this.kept) words.push(this.kept.has(at) ? "kept" : "dropped");
    const score = this.scores?.[at];
    if (score !== null && score !== undefined) words.push(`rank ${this.ranks[at]} of ${all}, score ${score >= 1e-4 ? score.toPrecision(3) : score.toExponential(2)}`);
    else if (this.scores) words.push("gone before it was scored");
    else if (this.kept) words.push("no score by patch");
    this.detail.textContent = words.join(" · ");
  }
}
