// <job-progress job="…">: a bar that says what it knows of a job, and whether that is live. Drawn at most once per frame.
//
// Attributes: job; url, of the server if the page is another's. Parts to style: bar, fill, label; states as attributes:
// data-status, and data-live, which is "false" while what is shown may be old. All on a page share a connection;
// `element.client = connect({…})` gives it another.

import { connect } from "./client.js";

const STYLE = `
:host { display: inline-grid; grid-template-columns: 1fr 3.5em; align-items: center; gap: .5em; min-width: 10em; contain: content; font-variant-numeric: tabular-nums }
:host([hidden]) { display: none }
[part=bar] { height: .5em; border-radius: .25em; overflow: hidden; background: color-mix(in srgb, currentColor 15%, transparent) }
[part=label] { contain: strict; height: 1.5em; line-height: 1.5; text-align: end }
[part=fill] { --fill: var(--job-progress-color, #3b74e6); height: 100%; background: linear-gradient(var(--fill) 0 0) 0 / 0 no-repeat }
:host([data-status=completed]) [part=fill] { --fill: #1a7f45 }
:host([data-status=failed]) [part=fill] { --fill: #cf3a30 }
:host([data-status=cancelled]) [part=fill] { --fill: #6b7480 }
:host([data-live=false]) { opacity: .6 }
:host([data-live=false]) [part=fill] { background-image: repeating-linear-gradient(-45deg, #fff8 0 .5em, #fff0 .5em 1em), linear-gradient(var(--fill) 0 0) }
`;

const clients = new Map(); // by url
const waiting = new Set(); // to be drawn

function draw() {
  for (const element of waiting) element.draw();
  waiting.clear();
}

function drawSoon(element) {
  if (!waiting.size) requestAnimationFrame(draw);
  waiting.add(element);
}

class JobProgress extends (globalThis.HTMLElement ?? Object) {
  static observedAttributes = ["job", "url"];
  #client;
  #job;
  #watched;
  #off;
  #parts;
  #filled;
  #said;

  get client() {
    const url = this.getAttribute("url") ?? undefined;
    if (!this.#client && !clients.has(url)) clients.set(url, connect({ url }));
    return this.#client ?? clients.get(url);
  }

  set client(client) {
    this.#client = client;
    this.attributeChangedCallback();
  }

  get job() {
    return this.#job;
  }

  connectedCallback() {
    // Set before this element was known as what it is, it would hide the setter.
    if (Object.hasOwn(this, "client")) {
      const { client } = this;
      delete this.client;
      this.client = client;
    }
    if (!this.#parts) {
      const root = this.attachShadow({ mode: "open" });
      const style = new CSSStyleSheet();
      style.replaceSync(STYLE);
      root.adoptedStyleSheets = [style];
      const part = (name, parent) => {
        const element = parent.appendChild(document.createElement("div"));
        element.part = name;
        return element;
      };
      const bar = part("bar", root);
      this.#parts = { fill: part("fill", bar), label: part("label", root) };
      this.#parts.label.ariaHidden = "true";
      this.role = "progressbar";
      if (!this.hasAttribute("aria-label") && !this.hasAttribute("aria-labelledby")) this.ariaLabel = "Progress";
    }
    this.#watch();
  }

  disconnectedCallback() {
    this.#watched?.close();
    this.#off?.();
  }

  attributeChangedCallback() {
    this.disconnectedCallback();
    this.#job = undefined;
    if (this.isConnected && this.#parts) this.#watch();
  }

  #watch() {
    const job = this.getAttribute("job");
    drawSoon(this);
    if (!job) return;
    const { client } = this;
    this.#watched = client.watch(job, (record) => {
      this.#job = record.type === "job_deleted" ? undefined : record;
      drawSoon(this);
    });
    this.#off = client.onState(() => drawSoon(this));
  }

  draw() {
    const { fill, label } = this.#parts;
    const job = this.#job;
    const live = Boolean(this.#watched?.live);
    const status = job?.status ?? "unknown";
    // 0 until somebody reports a progress: while it is worked on, that is no number to show.
    const known = job && (job.progress || job.steps || status !== "processing");
    const progress = known ? (job.progress ?? 0) : 0;
    // Finer than that nobody sees it, and each change is painted.
    const filled = Math.round(progress * 5) / 500;
    const text = known ? `${Math.floor(progress)} %` : "…";
    if (this.#filled !== filled) fill.style.backgroundSize = `${100 * (this.#filled = filled)}%`;
    if (this.#said === (this.#said = `${text}, ${status}${live ? "" : ", not live"}`)) return;
    label.textContent = text;
    this.setAttribute("aria-valuetext", this.#said);
    this.setAttribute("data-status", status);
    this.setAttribute("data-live", String(live));
    if (known) this.setAttribute("aria-valuenow", String(Math.floor(progress)));
    else this.removeAttribute("aria-valuenow");
  }
}

globalThis.customElements?.define("job-progress", JobProgress);
