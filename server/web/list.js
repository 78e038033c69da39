// The list of jobs: only the rows in sight are elements, however many jobs there are. Nothing is measured while it is
// drawn; sizes are noted when they change.

import { clock, doing, duration, el, hasEnded, join, known, percent } from "./dom.js";

const BEYOND = 4; // rows above and below what is in sight
const TOOLTIP_FROM = 30; // characters that fit any row

export function createList({ box, sizer, onOpen, onScroll }) {
  let entries = [];
  let height = 0;
  let rowHeight = 56;
  let top = 0;
  let active = -1; // index of what the keyboard stands on
  let activeId = null;
  let openId = null;
  let size = -1;
  const rows = new Map(); // index -> row
  const spare = [];
  let made = 0;

  new ResizeObserver(([entry]) => {
    height = entry.contentRect.height;
    rowHeight = parseFloat(getComputedStyle(box).getPropertyValue("--row")) * parseFloat(getComputedStyle(document.documentElement).fontSize);
    size = -1;
    for (const row of rows.values()) row.index = -1;
    onScroll();
  }).observe(box);
  box.addEventListener(
    "scroll",
    () => {
      top = box.scrollTop;
      onScroll();
    },
    { passive: true },
  );

  function makeRow() {
    const item = el("div", "job");
    item.id = `row-${(made += 1)}`;
    item.setAttribute("role", "option");
    const row = { item, texts: new Map(), index: -1, entry: null, record: null };
    for (const name of ["name", "who", "badge", "bar", "percent", "what", "when"]) {
      row[name] = el("span", name);
      item.append(row[name]);
    }
    row.fill = el("span", "fill");
    row.bar.append(row.fill);
    sizer.append(item);
    return row;
  }

  function say(row, part, text) {
    if (row.texts.get(part) === text) return;
    row.texts.set(part, text);
    row[part].textContent = text;
    if (text.length > TOOLTIP_FROM) row[part].title = text;
    else row[part].removeAttribute("title");
  }

  function paint(row, entry) {
    const { record } = entry;
    row.record = record;
    if (row.item.dataset.status !== record.status) row.item.dataset.status = record.status;
    const attempt = record.attempt > 1 && `attempt ${record.attempt}`;
    say(row, "name", record.jobId);
    say(row, "who", join([record.kind, record.userId, record.parentId && `part of ${record.parentId}`, attempt]));
    say(row, "badge", record.cancelRequested && !hasEnded(record) ? "cancelling" : record.status);
    say(row, "what", doing(record));
    say(row, "percent", percent(record));
    const value = known(record);
    if (row.value !== value) {
      // Another job's bar does not slide over to this one's length.
      row.bar.classList.toggle("unknown", value === null);
      row.fill.style.transform = `scaleX(${(value ?? 0) / 100})`;
      row.value = value;
    }
  }

  function when({ record, at }, live) {
    if (hasEnded(record)) return `at ${clock(record.endedAt ?? record.timestamp)}`;
    // Nothing counts down while nobody knows.
    if (!live || record.status !== "processing" || record.estimatedTimeRemaining === undefined) return "";
    const seconds = Math.round(record.estimatedTimeRemaining - (performance.now() - at) / 1000);
    return seconds > 0 ? `${duration(seconds)} left` : "any moment";
  }

  function place(row, index) {
    row.index = index;
    row.item.style.transform = `translateY(${index * rowHeight}px)`;
    row.item.setAttribute("aria-posinset", index + 1);
  }

  function choose(index) {
    active = Math.max(0, Math.min(entries.length - 1, index));
    activeId = entries[active]?.record.jobId ?? null;
    if (active * rowHeight < top) box.scrollTop = top = active * rowHeight;
    else if ((active + 1) * rowHeight > top + height) box.scrollTop = top = (active + 1) * rowHeight - height;
    onScroll();
  }

  const page = () => Math.max(1, Math.floor(height / rowHeight) - 1);
  const MOVES = {
    ArrowDown: () => choose(active + 1),
    ArrowUp: () => choose(active - 1),
    PageDown: () => choose(active + page()),
    PageUp: () => choose(active - page()),
    Home: () => choose(0),
    End: () => choose(entries.length - 1),
    Enter: () => activeId !== null && onOpen(activeId),
    " ": () => activeId !== null && onOpen(activeId),
  };
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !MOVES[event.key] || !entries.length) return;
    event.preventDefault();
    MOVES[event.key]();
  });
  box.addEventListener("focus", () => {
    if (active < 0 && entries.length) choose(Math.ceil(top / rowHeight));
  });
  box.addEventListener("click", (event) => {
    const item = event.target.closest(".job");
    // Not `row.index`: after a change of size it is not known before the next frame.
    const [index, row] = (item && [...rows].find(([, one]) => one.item === item)) ?? [];
    if (!row) return;
    choose(index);
    onOpen(row.entry.record.jobId);
  });

  return {
    /** Show these, in this order; what the keyboard stands on goes along. */
    set(wanted) {
      entries = wanted;
      if (activeId === null) return;
      if (entries[active]?.record.jobId !== activeId) active = entries.findIndex((entry) => entry.record.jobId === activeId);
      if (active < 0) activeId = null;
    },

    /** Mark the job whose timeline is shown; null for none. */
    mark(jobId) {
      openId = jobId;
    },

    draw(live) {
      if (size !== entries.length) {
        size = entries.length;
        sizer.style.height = `${size * rowHeight}px`;
      }
      const first = Math.max(0, Math.floor(top / rowHeight) - BEYOND);
      const last = Math.min(entries.length, Math.ceil((top + height) / rowHeight) + BEYOND);
      for (const [index, row] of rows) {
        if (index >= first && index < last) continue;
        rows.delete(index);
        spare.push(row);
      }
      for (let index = first; index < last; index += 1) {
        const entry = entries[index];
        let row = rows.get(index);
        if (!row) {
          row = spare.pop() ?? makeRow();
          row.item.hidden = false;
          rows.set(index, row);
        }
        if (row.index !== index) place(row, index);
        if (row.entry !== entry) {
          row.item.classList.add("still");
          row.entry = entry;
          row.moved = true;
        } else if (row.moved) {
          row.item.classList.remove("still");
          row.moved = false;
        }
        if (row.record !== entry.record) paint(row, entry);
        say(row, "when", when(entry, live));
        const { jobId } = entry.record;
        if (row.active !== (jobId === activeId)) {
          row.active = jobId === activeId;
          row.item.setAttribute("aria-selected", row.active);
          row.item.classList.toggle("active", row.active);
        }
        if (row.size !== size) row.item.setAttribute("aria-setsize", (row.size = size));
        if (row.open !== (jobId === openId)) row.item.classList.toggle("open", (row.open = jobId === openId));
      }
      for (const row of spare) if (!row.item.hidden) row.item.hidden = true;
      const at = rows.get(active)?.item.id ?? null;
      if (box.getAttribute("aria-activedescendant") === at) return;
      if (at) box.setAttribute("aria-activedescendant", at);
      else box.removeAttribute("aria-activedescendant");
    },
  };
}
