// The picture: chosen, dropped, pasted, or one of the samples.

import { pictureAt, send } from "./api.js";
import { byId, fault, make } from "./dom.js";

export function pictureField(about, onChange) {
  const drop = byId("drop"), file = byId("file"), shown = byId("shown"), wrong = byId("picture-fault");
  const buttons = about.samples.map((name, i) =>
    make("button", { type: "button", "aria-pressed": "false", "aria-label": `Sample picture ${i + 1}`, data: { name }, onclick: () => choose(name) },
      make("img", { src: pictureAt(name), alt: "", loading: "lazy" })));
  byId("samples").replaceChildren(...buttons);

  function show(name) {
    fault(wrong, "");
    shown.hidden = false;
    shown.src = pictureAt(name);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.name === name));
  }

  function choose(name) {
    show(name);
    onChange(name);
  }

  shown.addEventListener("error", () => {
    shown.hidden = true;
    fault(wrong, "The picture of this link is not here any more; choose it again, or take a sample.");
  });

  async function take(blob) {
    if (!blob) return;
    if (blob.size > about.limits.bytes) {
      const size = (blob.size / 2 ** 20).toFixed(1);
      fault(wrong, `The picture has ${size} MB; at most ${about.limits.bytes / 2 ** 20} MB are taken, make it smaller.`);
      return;
    }
    drop.classList.add("busy");
    try {
      choose((await send(blob)).id);
    } catch (error) {
      fault(wrong, error.message);
    } finally {
      drop.classList.remove("busy");
    }
  }

  file.addEventListener("change", async () => {
    await take(file.files[0]);
    file.value = "";
  });
  const isFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", isFile(event));
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const found = event.dataTransfer.files[0];
    if (found) take(found);
    else fault(wrong, "That was no file; save the picture first, then drop it here.");
  });
  document.addEventListener("paste", (event) => {
    const found = [...(event.clipboardData?.files || [])][0];
    if (!found) return; // text, for a field
    event.preventDefault();
    take(found);
  });
  return { show };
}
