// Small things that all parts of the dashboard use. Whatever comes from outside becomes text here, never markup.

const ENDED = new Set(["completed", "failed", "cancelled"]);
export const STATUSES = ["processing", "queued", "stalled", "completed", "failed", "cancelled"];

export const $ = (id) => document.getElementById(id);
export const hasEnded = (record) => ENDED.has(record.status);

/** An element with classes and content; strings become text nodes. */
export function el(tag, className = "", ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content);
  return element;
}

export function button(text, action, className = "") {
  const element = el("button", className, text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

/** Text that is there already is left alone: writing it costs a layout. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Characters that turn the direction of what comes after them: with these a text could pass for what stands beside it.
const TURNING = /[\u202a-\u202e\u2066-\u2069]/g;
const OTHER_SCRIPT = /[^\u0000-\u024f]/;

/** Texts in one line, each in the direction of its own script. */
export function join(parts) {
  const texts = parts.filter(Boolean).map(asText);
  return texts.map((text) => (OTHER_SCRIPT.test(text) ? `\u2068${text}\u2069` : text)).join(" · ");
}

export function asText(value) {
  if (value === undefined || value === null) return "";
  return (typeof value === "string" ? value : JSON.stringify(value)).replace(TURNING, "");
}

const two = (number) => String(number).padStart(2, "0");

/** Seconds in words. */
export function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${two(whole % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${two(minutes % 60)} min` : `${Math.floor(hours / 24)} days`;
}

/** A time of day, of unix milliseconds or a timestamp; with the date if it is not today's. */
export function clock(time) {
  const date = new Date(time);
  if (Number.isNaN(date.getTime())) return "";
  const today = date.toDateString() === new Date().toDateString();
  return today ? date.toLocaleTimeString() : date.toLocaleString();
}

// Made once: a locale's own formatting takes some microseconds, an Intl object a hundred times that.
const numbers = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });

export function amount(value) {
  return typeof value === "number" && Number.isFinite(value) ? numbers.format(value) : "–";
}

export function bytes(value) {
  const units = ["B", "KB", "MB", "GB"];
  let at = 0;
  for (; value >= 1000 && at < units.length - 1; at += 1) value /= 1000;
  return `${amount(value)} ${units[at]}`;
}

/** Progress as text, rounded down: 100 % is for jobs that are done. Empty while nothing is known. */
export function percent(record) {
  const value = known(record);
  return value === null ? "" : `${Math.floor(value)} %`;
}

// A record's progress is 0 until somebody reports one: while it is worked on, that is no number to show.
export function known(record) {
  return record.status === "processing" && !record.progress && !record.steps ? null : (record.progress ?? 0);
}

/** What a job is doing, or what became of it, in one line. */
export function doing(record) {
  const { status, steps } = record;
  if (status === "failed" || status === "stalled") return asText(record.error ?? record.message);
  if (hasEnded(record)) return asText(record.message);
  const now = asText(record.currentOperation ?? record.message);
  const count = steps?.total === undefined ? "" : `${steps.done ?? 0}/${steps.total}`;
  return join([record.stage, now, !now.includes(count) && count, steps?.failed && `${steps.failed} failed`]);
}

/** A polyline in a box of 100 by 30, of points as [x, y] between 0 and 1. */
export function curve() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "curve");
  line.setAttribute("points", "");
  line.setAttribute("vector-effect", "non-scaling-stroke");
  svg.append(line);
  const draw = (points) => {
    line.setAttribute("points", points.map(([x, y]) => `${(x * 100).toFixed(1)},${(29 - y * 28).toFixed(1)}`).join(" "));
  };
  return { svg, draw };
}
