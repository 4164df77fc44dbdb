// The search runs in a worker, which browsers refuse to a page that was opened as a file. There a hidden frame does its work.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script src="${new URL(address, location)}"><\/script>`;
      this.window = new Promise((ready) => {
        frame.addEventListener("load", () => {
          const inside = frame.contentWindow;
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          ready(inside);
        });
      });
      document.body.append(frame);
    }

    async postMessage(data) {
      const inside = await this.window;
      inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    }
  };
}
