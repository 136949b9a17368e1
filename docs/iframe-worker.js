// A browser starts no worker from a page that is opened as a file: there, the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve, reject) => {
        this.frame.onload = () => {
          const inside = this.frame.contentWindow;
          inside.postMessage = (message) => {
            const data = structuredClone(message);
            setTimeout(() => this.onmessage?.(new MessageEvent("message", { data })));
          };
          const script = inside.document.createElement("script");
          script.src = new URL(url, document.baseURI);
          script.onload = resolve;
          script.onerror = reject;
          inside.document.body.append(script);
        };
      });
      this.ready.catch((event) => this.onerror?.(event));
      document.body.append(this.frame);
    }

    postMessage(message) {
      const data = structuredClone(message);
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })), () => {});
    }

    terminate() {
      this.frame.remove();
    }
  };
}
