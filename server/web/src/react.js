// Hooks on the client. What they give changes at most once per frame, and stays the same object while nothing changes.

import { createContext, useContext, useEffect, useMemo, useState, useSyncExternalStore } from "react";
import { connect } from "./client.js";

const KEPT = 100; // notifications
const NONE = [];

/** The client to use below it; without one, all share one of their own. */
export const StatusContext = createContext();

let common;
function useClient(hasOwn, own) {
  const given = useContext(StatusContext);
  return hasOwn ? own : (given ?? (globalThis.document && (common ??= connect())));
}


const none = () => none;

/** `what` is a list of things to watch; `read(newest, last, news, watch)` makes a value, here called `name`, of what comes. */
function useWatch(client, what, name, read, isOn, start) {
  const [subscribe, get] = useMemo(() => {
    let now = { state: "connecting", live: false, [name]: start };
    return [
      (changed) => {
        let news = [];
        let planned;
        const update = () => {
          const { state, transport, error } = client;
          const live = (watch ?? client).live;
          const next = { live, state, transport, error, [name]: news[0] ? read(news.at(-1), now[name], news, watch) : now[name] };
          news = [];
          planned = false;
          for (const key in next) if (next[key] !== now[key]) return changed((now = next));
        };
        // Pages that are not seen have no frames.
        const plan = () => (planned ||= setTimeout(() => (document.hidden ? update() : requestAnimationFrame(update))));
        const stopped = new AbortController();
        // Notifications reach every watch of a channel: the first is enough.
        const [watch] = what.map((one, index) => client.watch(one, (item) => index || plan(news.push(item)), stopped));
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
  return useSyncExternalStore(client && isOn ? subscribe : none, get, get);
}

const present = (job) => (job.type === "job_deleted" ? undefined : job);

export const useJobStatus = (jobId) => useWatch(useClient(), jobId ? [jobId] : NONE, "job", present, true);

export const useJobs = (what = {}) => useWatch(useClient(), [what], "jobs", (job, last, news, watch) => watch.jobs, true, NONE);

export const useNotifications = ({ userId, channels = NONE } = {}) =>
  useWatch(
    useClient(),
    ["", ...channels].map((channel) => ({ channel, userId })),
    "notifications",
    (one, last, news) => [...last, ...news].slice(-KEPT),
    true,
    NONE,
  );

const STATUS = { queued: "pending", processing: "running", stalled: "running", cancelled: "failed" };

function asTask({ jobId: taskId, status, result: results, error, ...rest }) {
  return { ...rest, taskId, status: STATUS[status] ?? status, results, error: status === "cancelled" ? status : error };
}

const useTelling = (value, callback, after) => useEffect(() => {
    if (value) {
      callback?.(value);
      return after;
    }
  }, [value]);

export function useTaskProgress(taskId, { onProgress, onError, onConnect, onDisconnect, ...options } = {}) {
  // With settings of its own it has a connection of its own, and another one if they change, as far as that can be seen.
  const settings = JSON.stringify(options, (key, value) => value?.name ?? value);
  const [own, setOwn] = useState();
  const [wanted, want] = useState(true);
  const client = useClient(settings[2], own);
  useEffect(() => {
    if (settings[2] && wanted) {
      const made = connect(options);
      setOwn(made);
      return made.disconnect;
    }
  }, [settings, wanted]);
  const { progress, live, state, error } = useWatch(client, taskId ? [taskId] : NONE, "progress", asTask, wanted);
  const isConnected = wanted && live;
  useTelling(progress, onProgress);
  useTelling(error, onError);
  useTelling(isConnected, onConnect, onDisconnect);
  return {
    progress,
    error: error?.message ?? progress?.error,
    isConnected,
    connection: wanted ? state : "closed",
    reconnect: () => (wanted ? client?.reconnect() : want(true)),
    disconnect: () => want(false),
  };
}
