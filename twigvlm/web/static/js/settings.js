// All that can be set, and the link that says it.

export const UNPRUNED = "unpruned";
export const MOST_METHODS = 4;
const LONGEST_SPEC = 200; // letters of a method with its settings
const KINDS = ["chain", "auto", "tree", "tree-auto"];

export function usual(about) {
  const methods = [{ spec: UNPRUNED, drafts: false }];
  const wanted = about.twig ? ["twig", "twig-discount"] : ["fastv"];
  for (const spec of wanted) methods.push({ spec, drafts: about.twig });
  return {
    picture: about.samples[0],
    question: "Describe the image in detail.",
    methods,
    R: Math.round(about.V / 9),
    kind: "chain",
    chain: 5,
    tree: "3,2,4,8",
    longest: Math.min(128, about.limits.max_new_tokens),
    seed: 0,
    verify: true,
    heat: false,
    rejected: true,
  };
}

export function toHash(s) {
  const words = new URLSearchParams();
  words.set("picture", s.picture);
  words.set("q", s.question);
  for (const method of s.methods) words.append("m", `${method.drafts ? "" : "-"}${method.spec}`);
  words.set("R", String(s.R));
  words.set("drafts", { chain: String(s.chain), auto: "auto", tree: `tree:${s.tree}`, "tree-auto": "tree:auto" }[s.kind]);
  words.set("tokens", String(s.longest));
  words.set("seed", String(s.seed));
  for (const name of ["verify", "heat", "rejected"]) words.set(name, s[name] ? "1" : "0");
  return `#${words}`;
}

/** Settings as a link says them; what it does not say, or says wrong, stays as it usually is. `about` holds the limits. */
export function fromHash(hash, s, about) {
  const words = new URLSearchParams(hash.replace(/^#/, ""));
  const found = { ...s };
  const number = (name, low, high, whole) => {
    const value = Number(words.get(name));
    const good = words.get(name) && Number.isFinite(value) && value >= low && value <= high;
    return good && (!whole || Number.isInteger(value)) ? value : null;
  };
  if (words.get("picture")) found.picture = words.get("picture");
  if (words.has("q")) found.question = words.get("q");
  if (words.has("m")) {
    const specs = words.getAll("m").filter((m) => m.length <= LONGEST_SPEC).slice(0, MOST_METHODS);
    found.methods = specs.map((m) => ({ spec: m.replace(/^-/, ""), drafts: !m.startsWith("-") }));
  }
  found.R = number("R", 1, about.V, false) ?? s.R;
  found.longest = number("tokens", 1, about.limits.max_new_tokens, true) ?? s.longest;
  found.seed = number("seed", 0, Number.MAX_SAFE_INTEGER, true) ?? s.seed;
  const drafts = words.get("drafts") || "";
  if (/^\d+$/.test(drafts) && Number(drafts) <= about.limits.draft_length) Object.assign(found, { kind: "chain", chain: Number(drafts) });
  else if (drafts === "auto") found.kind = "auto";
  else if (drafts === "tree:auto") found.kind = "tree-auto";
  else if (drafts.startsWith("tree:")) Object.assign(found, { kind: "tree", tree: drafts.slice(5) });
  for (const name of ["verify", "heat", "rejected"]) if (words.has(name)) found[name] = words.get(name) === "1";
  return found;
}

/** The body of a request to run one method. */
export function asked(s, method) {
  const body = { picture: s.picture, question: s.question, method: method.spec, R: s.R, max_new_tokens: s.longest, seed: s.seed, check: s.verify };
  if (!method.drafts) return { ...body, draft_length: 0 };
  if (s.kind === "tree") return { ...body, tree: s.tree };
  if (s.kind === "tree-auto") return { ...body, tree: "auto" };
  return { ...body, draft_length: s.kind === "auto" ? "auto" : s.chain };
}

export { KINDS };
