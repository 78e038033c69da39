// One job from its beginning to now: what is kept of its updates, and those that come while one looks.

import { asText, button, clock, curve, doing, duration, el, hasEnded, join, known, percent, write } from "./dom.js";
import { call } from "./session.js";

const SHOWN = 300; // updates, the newest
const CURVE_MS = 250;

// What is said of a job apart from its progress, in this order.
const FACTS = [
  ["User", (job) => job.userId],
  ["Kind", (job) => job.kind],
  ["Part of", (job) => job.parentId],
  ["Worker", (job) => job.workerId],
  ["Attempt", (job) => (job.attempt > 1 ? String(job.attempt) : "")],
  ["Created", (job) => clock(job.createdAt)],
  ["Took", (job) => job.endedAt && job.startedAt && duration((Date.parse(job.endedAt) - Date.parse(job.startedAt)) / 1000)],
  ["Expected", (job) => !hasEnded(job) && job.estimatedCompletionTime && clock(job.estimatedCompletionTime)],
  ["Error", (job) => asText(job.error)],
  ["Result", (job) => asText(job.result)],
  ["Metadata", (job) => (job.metadata && Object.keys(job.metadata).length ? asText(job.metadata) : "")],
  ["Version", (job) => String(job.version)],
];

const jobPath = (jobId) => `api/v2/jobs/${encodeURIComponent(jobId)}`;

export function createTimeline({ root, ask, complain, onClose, schedule }) {
  const name = el("h2", "name");
  name.id = "timeline-name";
  name.tabIndex = -1;
  const badge = el("span", "badge");
  const value = el("span", "percent");
  const progress = curve();
  const facts = new Map(FACTS.map(([title]) => [title, el("dd")]));
  const rows = el("dl", "facts");
  for (const [title, text] of facts) rows.append(el("div", "", el("dt", "", title), text));
  const state = el("p", "quiet");
  const list = el("ol", "updates");
  const cancel = button("Cancel job", () => stop("cancel"));
  const discard = button("Delete job", () => stop("delete"), "danger");
  const head = el("div", "line", name, badge, value, button("Close", () => api.close(), "push"));
  list.setAttribute("aria-label", "Updates, newest first");
  list.tabIndex = 0;
  root.append(head, progress.svg, el("div", "line", cancel, discard), rows, state, list);

  let me;
  let job = null; // the newest record
  let jobId = null;
  let updates = []; // by version, the newest SHOWN at most
  let waiting = []; // live ones that came before the history
  let fresh = 0; // how many of the last ones are not drawn yet
  let earliest = true; // whether the first of `updates` is the job's first
  let status = ""; // loading | shown | failed | deleted
  let why = "";
  let asked; // the request for the history
  let curveAt = 0;
  let curveOf; // the last update in it
  let rebuilt = false;

  function load() {
    asked?.abort();
    asked = new AbortController();
    const { signal } = asked;
    updates = [];
    waiting = [];
    status = "loading";
    rebuilt = true;
    schedule();
    call(`${jobPath(jobId)}/history`, { signal }).then(
      (answer) => {
        if (signal.aborted) return;
        const all = new Map();
        for (const one of [...answer.updates, ...waiting]) all.set(one.version, one);
        updates = [...all.values()].sort((one, other) => one.version - other.version);
        earliest = updates[0]?.version === 1 && updates.length <= SHOWN;
        updates = updates.slice(-SHOWN);
        job = updates.at(-1) ?? job;
        waiting = [];
        status = "shown";
        rebuilt = true;
        schedule();
      },
      (error) => {
        if (signal.aborted) return;
        status = error.status === 404 ? "deleted" : "failed";
        why = error.message;
        schedule();
      },
    );
  }

  function take(record) {
    if (status === "loading") {
      waiting.push(record);
      if (waiting.length > 2 * SHOWN) waiting.splice(0, SHOWN);
    } else if (record.version > (updates.at(-1)?.version ?? 0)) {
      updates.push(record);
      fresh += 1;
      // Nothing is drawn while nobody looks: what comes meanwhile is bounded here.
      if (updates.length > 2 * SHOWN) trim();
    }
  }

  function trim() {
    if (updates.length <= SHOWN) return;
    updates.splice(0, updates.length - SHOWN);
    earliest = false;
  }

  function item(record, before) {
    const line = el("li");
    line.dataset.status = record.status;
    const gap = before ? record.version - before.version - 1 : 0;
    if (gap > 0) line.append(el("p", "quiet", `${gap} updates in between were not shown`));
    const time = el("time", "quiet", clock(record.timestamp));
    time.dateTime = record.timestamp;
    const first = el("p", "line", time);
    if (!before || before.status !== record.status) first.append(el("span", "badge", record.status));
    if (!before || before.attempt !== record.attempt) if (record.attempt > 1) first.append(el("span", "quiet", `attempt ${record.attempt}`));
    if (!before || known(before) !== known(record)) first.append(el("span", "percent", percent(record)));
    if (record.cancelRequested && !before?.cancelRequested) first.append(el("span", "quiet", "cancel requested"));
    const text = doing(record);
    line.append(first);
    if (text && (!before || text !== doing(before))) line.append(el("p", "what", text));
    return line;
  }

  function drawList() {
    if (rebuilt) {
      list.replaceChildren(...updates.map((record, at) => item(record, updates[at - 1])).reverse());
      rebuilt = false;
      curveAt = 0;
      curveOf = null;
    } else if (fresh) {
      const shown = updates.slice(-Math.min(fresh, SHOWN));
      let before = updates[updates.length - shown.length - 1];
      for (const record of shown) {
        list.prepend(item(record, before));
        before = record;
      }
      while (list.children.length > SHOWN) list.lastElementChild.remove();
    }
    fresh = 0;
    trim();
  }

  function drawCurve(now) {
    if (now - curveAt < CURVE_MS) return;
    curveAt = now;
    if (curveOf === updates.at(-1)) return;
    curveOf = updates.at(-1);
    progress.svg.toggleAttribute("hidden", updates.length < 2);
    const times = updates.map((record) => Date.parse(record.timestamp));
    const span = times.at(-1) - times[0] || 1;
    progress.draw(updates.map((record, at) => [(times[at] - times[0]) / span, (record.progress ?? 0) / 100]));
  }

  /** Cancel or delete the job, once a person has agreed. */
  async function stop(how) {
    const id = jobId;
    const words = {
      cancel: [`Ask the worker of ${id} to stop?`, "Cancel job"],
      delete: [`Delete ${id} and its history, for everyone? This cannot be undone.`, "Delete job"],
    };
    if (!(await ask(...words[how]))) return;
    try {
      if (how === "cancel") await call(`${jobPath(id)}/cancel`, { method: "POST" });
      else await call(jobPath(id), { method: "DELETE" });
      complain("");
    } catch (error) {
      // It has ended or gone meanwhile: that is what was wanted.
      if (error.status === 409 || (how === "delete" && error.status === 404)) return;
      complain(`${id} was not ${how === "cancel" ? "cancelled" : "deleted"}: ${error.message}`);
    }
  }

  const api = {
    get jobId() {
      return jobId;
    },

    open(id, record, who) {
      me = who;
      jobId = id;
      job = record ?? null;
      root.hidden = false;
      load();
      name.focus({ preventScroll: false });
    },

    close() {
      if (jobId === null) return;
      asked?.abort();
      jobId = job = null;
      updates = [];
      list.replaceChildren();
      root.hidden = true;
      onClose();
    },

    /** A record of some job, live. */
    hear(record) {
      if (record.jobId !== jobId) return;
      if (record.type === "job_deleted") {
        status = "deleted";
        asked?.abort();
      } else {
        const anew = job && job.createdAt !== record.createdAt;
        // After a break, or a new job under the same id, what is kept says what happened.
        const behind = record.type === "snapshot" && record.version > (updates.at(-1)?.version ?? 0);
        job = record;
        if (anew || status === "deleted" || (behind && status === "shown")) load();
        else take(record);
      }
      schedule();
    },

    /** What is kept may be more than came live. */
    refresh() {
      if (jobId !== null) load();
    },

    draw(now) {
      if (jobId === null) return;
      write(name, jobId);
      if (root.dataset.status !== (job?.status ?? "")) root.dataset.status = job?.status ?? "";
      write(badge, job?.status ?? "");
      write(value, job ? percent(job) : "");
      for (const [title, read] of FACTS) {
        const text = (job && read(job)) || "";
        const cell = facts.get(title);
        write(cell, text);
        if (cell.parentElement.hidden !== !text) cell.parentElement.hidden = !text;
      }
      const gone = status === "deleted";
      cancel.hidden = gone || !job || hasEnded(job) || !(me.admin || me.userId === job.userId);
      discard.hidden = gone || !me.can("publish");
      cancel.disabled = Boolean(job?.cancelRequested);
      write(cancel, job?.cancelRequested ? "Cancelling" : "Cancel job");
      drawList();
      drawCurve(now);
      const said = {
        loading: "Loading what is kept of it",
        failed: `Its history cannot be shown: ${why}`,
        deleted: "This job was deleted, or you may not see it any more.",
        shown: join([`${updates.length === 1 ? "1 update" : `${updates.length} updates`}`, !earliest && "earlier ones are not shown"]),
      };
      write(state, said[status]);
    },
  };
  return api;
}
