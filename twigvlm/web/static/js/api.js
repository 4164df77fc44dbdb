// What the page asks of its server. Every failure becomes an Error whose message can be shown.

export const AWAY = "The server cannot be reached. Start it again (python -m twigvlm.web), then press Run.";
const BROKEN = "The server went away in the middle of the answer. Start it again (python -m twigvlm.web), then press Run.";

async function reason(response) {
  try {
    return (await response.json()).error || `The server answered ${response.status}.`;
  } catch {
    return `The server answered ${response.status} and nothing readable; reload the page.`;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(AWAY);
  }
  if (!response.ok) throw Object.assign(new Error(await reason(response)), { status: response.status });
  return response;
}

export const about = async () => (await ask("/api/about")).json();

export async function plan(method, R) {
  const query = new URLSearchParams({ method, R });
  return (await ask(`/api/plan?${query}`)).json();
}

export async function send(file) {
  const headers = { "content-type": file.type || "application/octet-stream" };
  return (await ask("/api/pictures", { method: "POST", body: file, headers })).json();
}

export const pictureAt = (name) => `/api/pictures/${encodeURIComponent(name)}`;

/** Ask, and hear every line as it comes. Aborting `signal` ends the work on the server within a step. */
export async function run(asked, signal, hear) {
  const headers = { "content-type": "application/json" };
  const response = await ask("/api/run", { method: "POST", headers, body: JSON.stringify(asked), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = null;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        last = JSON.parse(line);
        if (last.event === "error") throw new Error(last.error);
        hear(last);
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Error(BROKEN);
    throw error;
  }
  if (!last || !["done", "checked"].includes(last.event)) throw new Error(BROKEN);
}
