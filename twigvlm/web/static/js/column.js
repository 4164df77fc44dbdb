// One method's column: the picture, the answer, the figures.

import { make } from "./dom.js";
import { figuresOf } from "./figures.js";
import { Patches } from "./patches.js";
import { Words } from "./words.js";

export class Column {
  constructor(method, about, address, options) {
    this.method = method;
    this.name = method.drafts ? `${method.spec} + drafts` : method.spec;
    this.steps = [];
    this.done = this.checked = null;
    this.state = make("p", { class: "column-state" });
    this.patches = new Patches(about.V, this.name);
    this.patches.setHeat(options.heat());
    this.patches.show(address);
    this.words = new Words(this.name, options.rejected);
    this.badge = make("p", { class: "badge", hidden: true });
    this.figures = make("div");
    this.wrong = make("p", { class: "fault", role: "alert", hidden: true });
    this.place = make("article", { class: "column", "aria-label": this.name, data: { spec: method.spec, drafts: String(method.drafts) } },
      make("header", { class: "column-head" }, make("h3", {}, method.spec), this.state),
      make("div", {}, this.patches.canvas, this.patches.detail),
      make("div", {}, this.words.place, this.words.detail),
      make("div", {}, this.wrong, this.badge), this.figures);
    this.words.empty("The answer will stand here.");
    this.say(method.drafts ? "with drafts" : "without drafts");
  }

  say(text) {
    this.state.textContent = text;
  }

  mark(state) {
    this.place.classList.toggle("running", state === "running");
    this.place.dataset.state = state;
  }

  /** A line of the server. */
  hear(line) {
    if (line.event === "queued") {
      this.say(line.before ? `waiting, ${line.before} before this one` : "next");
    } else if (line.event === "started") {
      this.words.clear();
      this.say("reading the picture");
    } else if (line.event === "step") {
      this.steps.push(line);
      this.words.step(line, this.steps.length);
      this.say(`${line.at.toFixed(2)} s`);
    } else if (line.event === "done") {
      this.end(line);
    } else if (line.event === "checked") {
      this.checked = line;
      this.judge(line);
    }
  }

  end(line) {
    this.done = line;
    this.words.rest(line.rest);
    if (line.figures) {
      const f = line.figures;
      this.patches.set(line.kept, line.scores);
      const kept = line.kept === null ? "all patches" : `${line.kept.length} of ${f.visual_tokens} patches`;
      this.say(`${kept} · ${this.method.drafts ? `drafts: ${f.drafts}` : "no drafts"}`);
    }
    if (line.stopped) {
      this.stopped();
    } else if (this.method.drafts) {
      this.tell("not checked without drafts");
    }
  }

  tell(text, kind = "") {
    this.badge.hidden = false;
    this.badge.className = `badge ${kind}`.trim();
    this.badge.textContent = text;
  }

  /** The answer stands; whether it is the same without drafts was not found out, perhaps for a reason. */
  unchecked(reason = "") {
    this.mark("done");
    if (this.method.drafts && !this.checked) this.tell("not checked without drafts");
    this.wrong.hidden = !reason;
    this.wrong.textContent = reason;
  }

  checking() {
    this.tell("decoding again without drafts…");
  }

  judge(line) {
    if (line.same) this.tell("✓ same text without drafts", "same");
    else this.tell(`✗ differs without drafts, at token ${line.differs_at + 1}`, "other");
  }

  stopped() {
    this.mark("stopped");
    if (!this.steps.length) this.words.empty("Stopped before the first word.");
    this.say("stopped");
  }

  fail(reason) {
    this.mark("failed");
    this.wrong.hidden = false;
    this.wrong.textContent = reason;
    if (!this.steps.length) this.words.clear();
    this.say("no answer");
  }

  compare(base) {
    if (this.done?.figures) this.figures.replaceChildren(figuresOf(this.done.figures, base));
  }

  /** All words at once, those to come pale; `reveal` gives them their colour. */
  rewind() {
    this.words.clear();
    this.pending = this.steps.map((step, i) => ({ at: step.at, step, spans: this.words.step({ ...step, rejected: [] }, i + 1) }));
    this.steps.forEach((step, i) => {
      for (const span of this.pending[i].spans) {
        span.classList.add("later");
        const piece = step.pieces[this.pending[i].spans.indexOf(span)];
        span.told = this.words.tell({ ...piece, text: span.textContent }, step, i + 1);
      }
    });
    this.words.rest(this.done?.rest || []);
  }

  reveal(now) {
    while (this.pending?.length && this.pending[0].at <= now) {
      const { step, spans } = this.pending.shift();
      for (const span of spans) span.classList.remove("later");
      this.words.flash(step, spans.find((span) => !span.classList.contains("drafted")) || null);
    }
    return !this.pending?.length;
  }

  get record() {
    return { method: this.method.spec, drafts: this.method.drafts, text: this.words.text.trim(), steps: this.steps, ...this.done, event: undefined, rest: undefined, checked: this.checked };
  }
}
