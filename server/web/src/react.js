// Hooks on the client. What they give changes at most once per frame, and stays the same object while nothing changes.

import { createContext, useContext, useEffect, useMemo, useState, useSyncExternalStore } from "react";
import { connect } from "./client.js";

const KEPT = 100; // notifications
const NONE = [];

/** The client to use below it; without one, all share one of their own. */
export const StatusContext = createContext();

let common;
const useClient = () => useContext(StatusContext) ?? (globalThis.window && (common ??= connect()));

const none = () => none;

/** `what` is a list of things to watch; `read(news, last, watch)` makes a value, here called `name`, of what comes. */
function useWatch(client, what, name, read, start, paused) {
  const source = useMemo(() => {
    let now = { live: false, state: "connecting", [name]: start };
    return [
      (changed) => {
        let news = [];
        let planned;
        const update = () => {
          const { live, state, transport, error } = client;
          const next = { live, state, transport, error, [name]: news[0] ? read(news, now[name], watches[0]) : now[name] };
          news = [];
          planned = false;
          for (const key in next) if (next[key] !== now[key]) return changed((now = next));
        };
        // Pages that are not seen have no frames.
        const plan = () => (planned ||= setTimeout(() => (document.hidden ? update() : requestAnimationFrame(update))));
        const stopped = new AbortController();
        // Notifications reach every watch of a channel: the first is enough.
        const watches = what.map((one, index) => client.watch(one, (item) => index || plan(news.push(item)), stopped));
        const off = client.onState(plan);
        plan();
        return () => {
          planned = true;
          off();
          stopped.abort();
        };
      },
      () => now,
    ];
  }, [client, JSON.stringify(what)]);
  return useSyncExternalStore(client && !paused ? source[0] : none, source[1], source[1]);
}

const latest = (news) => news.at(-1);
const present = (news) => (latest(news).type === "job_deleted" ? undefined : latest(news));

export const useJobStatus = (jobId) => useWatch(useClient(), jobId ? [jobId] : NONE, "job", present);

export const useJobs = (what = {}) => useWatch(useClient(), [what], "jobs", (news, last, watch) => watch.jobs, NONE);

export const useNotifications = ({ userId, channels = NONE } = {}) =>
  useWatch(
    useClient(),
    ["", ...channels].map((channel) => ({ channel, userId })),
    "notifications",
    (news, last) => [...last, ...news].slice(-KEPT),
    NONE,
  );

const STATUS = { queued: "pending", processing: "running", stalled: "running", cancelled: "failed" };

function asTask(news) {
  const { jobId: taskId, status, result: results, error, ...rest } = latest(news);
  return { ...rest, taskId, status: STATUS[status] ?? status, results, error: status === "cancelled" ? status : error };
}

const useTelling = (value, callback, after) => useEffect(() => {
    if (!value) return;
    callback?.(value);
    return after;
  }, [value]);

export function useTaskProgress(taskId, { onProgress, onError, onConnect, onDisconnect, ...options } = {}) {
  const settings = JSON.stringify(options);
  const isShared = settings === "{}";
  const shared = useClient();
  const [own, setOwn] = useState();
  const [wanted, want] = useState(true);
  const client = isShared ? shared : own;
  // With settings of its own it has a connection of its own.
  useEffect(() => {
    if (isShared) return;
    const made = connect(options);
    setOwn(made);
    return made.disconnect;
  }, [settings]);
  const { progress, live, state, error } = useWatch(client, taskId ? [taskId] : NONE, "progress", asTask, undefined, !wanted);
  const isConnected = wanted && live;
  useTelling(progress, onProgress);
  useTelling(error, onError);
  useTelling(isConnected, onConnect, onDisconnect);
  return {
    progress,
    error: error?.message ?? progress?.error,
    isConnected,
    connection: wanted ? state : "closed",
    reconnect() {
      want(true);
      client?.reconnect();
    },
    disconnect: () => want(false),
  };
}
