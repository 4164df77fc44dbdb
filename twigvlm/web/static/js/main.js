// The page: settings on the left, answers on the right, one run at a time.

import * as api from "./api.js";
import { budgetField } from "./budget.js";
import { Column } from "./column.js";
import { byId, calm, fault, make } from "./dom.js";
import { methodsField } from "./methods.js";
import { pictureField } from "./picture.js";
import { replay } from "./replay.js";
import { KINDS, UNPRUNED, asked, fromHash, toHash, usual } from "./settings.js";

const QUESTIONS = ["Describe the image in detail.", "How many objects are there?", "Is there a star?", "What word is written in the image?"];

let about, s, fields, columns = [], running = null, playing = null, recorded = null;

// ------------------------------------------------------------------ settings

function change(more) {
  Object.assign(s, more);
  history.replaceState(null, "", toHash(s));
}

function shown() {
  byId("question").value = s.question;
  byId("draft-kind").value = KINDS.includes(s.kind) ? s.kind : "chain";
  byId("longest").value = s.longest;
  byId("seed").value = s.seed;
  byId("verify").checked = s.verify;
  byId("heat").checked = s.heat;
  byId("rejected").checked = s.rejected;
  fields.picture.show(s.picture);
  fields.methods.set(s.methods);
  fields.budget.set(s.R);
  draftSize();
  preview();
}

function draftSize() {
  const size = byId("draft-size"), tree = s.kind === "tree";
  size.hidden = s.kind === "auto" || s.kind === "tree-auto";
  size.value = tree ? s.tree : s.chain;
  size.inputMode = tree ? "text" : "numeric";
}

function readDraft() {
  const text = byId("draft-size").value.trim();
  if (s.kind === "tree") change({ tree: text });
  else if (/^\d+$/.test(text)) change({ chain: Number(text) });
}

/** Columns before anything is run: the picture, and what each method would leave in each layer. */
function preview() {
  fields.budget.schedules(s.methods, s.R);
  if (running) return;
  playing?.();
  columns = s.methods.map((method) => column(method));
  lay();
  byId("replay").disabled = true;
  state("idle");
}

function column(method) {
  return new Column(method, about, api.pictureAt(s.picture), { heat: () => s.heat, rejected: () => s.rejected });
}

function lay() {
  byId("columns").replaceChildren(...columns.map((c) => c.place));
  byId("columns").classList.toggle("one", columns.length === 1);
}

// ------------------------------------------------------------------ runs

function status(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

/** idle, running, replaying, done, stopped or failed, for style and for tests. */
function state(name) {
  byId("results").dataset.state = name;
}

function busy(on) {
  byId("run").disabled = on;
  byId("stop").disabled = !on;
  byId("replay").disabled = on || !columns.some((c) => c.steps.length);
}

async function run() {
  if (running) return;
  playing?.();
  if (!s.question.trim()) return wrong("The question is empty; ask something.", byId("question"));
  if (!s.methods.length) return wrong("No method is chosen; add one.", byId("add"));
  const mine = running = new AbortController();
  const settings = structuredClone(s);
  columns = settings.methods.map((method) => column(method));
  lay();
  busy(true);
  state("running");
  let reason = "";
  for (const one of columns) {
    if (mine.signal.aborted) one.stopped();
    else reason = (await runOne(one, settings, mine.signal)) || reason;
  }
  running = null;
  busy(false);
  recorded = { model: about.model, device: about.device, dtype: about.dtype, settings, columns: columns.map((c) => c.record) };
  byId("download").disabled = !columns.some((c) => c.steps.length);
  state(mine.signal.aborted ? "stopped" : reason ? "failed" : "done");
  if (mine.signal.aborted) status("Stopped. Run starts again.");
  else if (reason) status(reason, true);
  else if (!calm.matches) play();
  else status("Done. Replay plays the answers side by side at true speed.");
}

/** Gives back what went wrong, or nothing. */
async function runOne(one, settings, signal) {
  one.mark("running");
  status(`${one.name}: asking…`);
  const hear = (line) => {
    one.hear(line);
    if (line.event === "queued" && line.before) status(`${one.name}: waiting, ${line.before} before this one.`);
    if (line.event === "started") status(`${one.name}: writing…`);
    if (line.event === "done" && settings.verify && one.method.drafts && !line.stopped) {
      one.checking();
      status(`${one.name}: decoding again without drafts…`);
    }
    if (line.event === "done") compare();
  };
  try {
    await api.run(asked(settings, one.method), signal, hear);
    if (one.place.dataset.state === "running") one.mark("done");
    return "";
  } catch (error) {
    if (signal.aborted) {
      if (one.done) one.unchecked();
      else one.stopped();
      return "";
    }
    if (one.done) one.unchecked(error.message);
    else one.fail(error.message);
    return error.message;
  }
}

function wrong(text, place) {
  status(text, true);
  place.focus();
}

/** The base alone, nothing pruned and nothing drafted, if it was among the methods. */
function compare() {
  const base = columns.find((c) => c.method.spec === UNPRUNED && !c.method.drafts && c.done?.figures && !c.done.stopped);
  for (const one of columns) one.compare(base?.done.figures || null);
}

function play() {
  playing?.();
  byId("replay").textContent = "End replay";
  byId("replay").disabled = false;
  status("Replay at true speed.");
  const before = byId("results").dataset.state;
  state("replaying");
  playing = replay(columns, (now) => {
    byId("replay").textContent = `End replay (${now.toFixed(1)} s)`;
  }, () => {
    playing = null;
    state(before);
    byId("replay").textContent = "Replay";
    status("Done. Replay plays the answers side by side at true speed.");
  });
}

// ------------------------------------------------------------------ links and files

async function copy() {
  try {
    await navigator.clipboard.writeText(location.href);
    status("The link is copied; it holds all settings.");
  } catch {
    status("The address bar holds the link with all settings; copy it there.");
  }
}

function download() {
  const text = JSON.stringify(recorded, null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: address, download: "twigvlm-run.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// ------------------------------------------------------------------ beginning

function listen() {
  const on = (id, kind, call) => byId(id).addEventListener(kind, call);
  on("ask", "submit", (event) => { event.preventDefault(); run(); });
  on("stop", "click", () => running?.abort());
  on("replay", "click", () => (playing ? playing() : play()));
  on("copy", "click", copy);
  on("download", "click", download);
  on("question", "input", (event) => change({ question: event.target.value }));
  on("draft-kind", "change", (event) => { change({ kind: event.target.value }); draftSize(); });
  on("draft-size", "input", readDraft);
  on("longest", "input", (event) => { if (event.target.validity.valid && event.target.value) change({ longest: Number(event.target.value) }); });
  on("seed", "input", (event) => { if (event.target.validity.valid && event.target.value) change({ seed: Number(event.target.value) }); });
  on("verify", "change", (event) => change({ verify: event.target.checked }));
  on("rejected", "change", (event) => change({ rejected: event.target.checked }));
  on("heat", "change", (event) => {
    change({ heat: event.target.checked });
    for (const one of columns) one.patches.setHeat(s.heat);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
    if (event.key === "Escape" && running) running.abort();
  });
  window.addEventListener("hashchange", () => { s = fromHash(location.hash, s, about); shown(); });
}

async function begin() {
  try {
    about = await api.about();
  } catch (error) {
    byId("model").textContent = "no model";
    status(error.message, true);
    byId("run").disabled = true;
    return;
  }
  byId("model").textContent = `${about.model} · ${about.L} layers, ${about.V} visual tokens · ${about.device}, ${about.dtype}${about.twig ? "" : " · no twig"}`;
  byId("longest").max = about.limits.max_new_tokens;
  byId("question").maxLength = about.limits.question;
  s = fromHash(location.hash, usual(about), about);
  fields = {
    picture: pictureField(about, (picture) => { change({ picture }); preview(); }),
    methods: methodsField(about, (methods) => { change({ methods }); preview(); }),
    budget: budgetField(about, (R) => { change({ R }); fields.budget.schedules(s.methods, R); }),
  };
  byId("suggestions").replaceChildren(...QUESTIONS.map((text) => make("button", { type: "button", onclick: () => { byId("question").value = text; change({ question: text }); } }, text)));
  listen();
  shown();
  document.documentElement.dataset.ready = "true";
  fault(byId("picture-fault"), "");
}

begin();
