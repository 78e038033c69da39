// What is known of the jobs, and which of them are wanted in which order.

import { STATUSES, doing, hasEnded } from "./dom.js";

// Values to choose from in a filter; the rest is found by the search.
const CHOICES = 200;
const RANK = new Map(STATUSES.map((status, rank) => [status, rank]));

const byName = (one, other) => (one.record.jobId < other.record.jobId ? -1 : 1);
// Jobs of the same moment by name, so that the order never jumps.
const newest = (one, other) => other.created - one.created || byName(one, other);
const ORDERS = {
  created: newest,
  updated: (one, other) => other.at - one.at || newest(one, other),
  progress: (one, other) => (other.record.progress ?? 0) - (one.record.progress ?? 0) || newest(one, other),
  left: (one, other) => left(one) - left(other) || newest(one, other),
  status: (one, other) => RANK.get(one.record.status) - RANK.get(other.record.status) || newest(one, other),
  name: byName,
};
// Orders and filters that only depend on what seldom changes.
const STEADY = new Set(["created", "name", "status"]);

function left({ record }) {
  return hasEnded(record) ? Infinity : (record.estimatedTimeRemaining ?? 1e12);
}

function mentions({ record }, text) {
  const { jobId, userId, kind, stage, message, error, workerId } = record;
  return [jobId, userId, kind, stage, message, doing(record), error, workerId].some(
    (value) => typeof value === "string" && value.toLowerCase().includes(text),
  );
}

export function createJobs() {
  const byId = new Map(); // jobId -> {record, created, at}
  let changed = true; // what a view shows may be others now, or in another order
  let touched = false; // some record is another

  return {
    get size() {
      return byId.size;
    },
    get: (jobId) => byId.get(jobId),

    put(record) {
      const entry = byId.get(record.jobId);
      const now = performance.now();
      touched = true;
      if (!entry) {
        byId.set(record.jobId, { record, created: Date.parse(record.createdAt) || 0, at: now });
        changed = true;
        return;
      }
      const before = entry.record;
      if (before.status !== record.status || before.kind !== record.kind) changed = true;
      if (before.createdAt !== record.createdAt) {
        entry.created = Date.parse(record.createdAt) || 0;
        changed = true;
      }
      entry.record = record;
      entry.at = now;
    },

    drop(jobId) {
      if (byId.delete(jobId)) changed = true;
    },

    /** Let go of all but these. */
    keep(jobIds) {
      for (const jobId of byId.keys()) if (!jobIds.has(jobId)) byId.delete(jobId);
      changed = true;
    },

    clear() {
      byId.clear();
      changed = true;
    },

    /** Whether a view of such a choice may have become another since the last one. */
    hasNews: ({ sort, text }) => changed || (touched && (!STEADY.has(sort) || text !== "")),

    /**
     * The jobs that are wanted, in order, and what there is to choose from.
     * `choice`: {text, statuses: Set, kind, user, sort}; empty is everything.
     */
    view(choice) {
      changed = touched = false;
      const text = choice.text.toLowerCase();
      const counts = new Map();
      const kinds = new Set();
      const users = new Set();
      const entries = [];
      for (const entry of byId.values()) {
        const { status, kind, userId } = entry.record;
        counts.set(status, (counts.get(status) ?? 0) + 1);
        if (kind && kinds.size < CHOICES) kinds.add(kind);
        if (users.size < CHOICES) users.add(userId);
        if (choice.statuses.size && !choice.statuses.has(status)) continue;
        if (choice.kind && choice.kind !== kind) continue;
        if (choice.user && choice.user !== userId) continue;
        if (text && !mentions(entry, text)) continue;
        entries.push(entry);
      }
      entries.sort(ORDERS[choice.sort]);
      return { entries, counts, kinds, users };
    },
  };
}
