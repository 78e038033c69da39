// The client: one connection, however many watch over it.

import { createConnection } from "./connection.js";
import { StatusError, createHttp } from "./http.js";
import { createStore, hasEnded } from "./store.js";

export { StatusError };

const QUEUE = 1000;

const HERE = import.meta.url ?? globalThis.document?.currentScript?.src;

/** See client.d.ts. */
export function connect(options = {}) {
  const { url = HERE && new URL(".", HERE), getToken, onProgress, onError, onConnect, onDisconnect } = options;
  const here = globalThis.location?.href;
  const base = new URL(url ?? "/", here);
  if (!base.pathname.endsWith("/")) base.pathname += "/";
  const http = createHttp(base, getToken);
  const watchers = new Set();
  let wasLive = false;

  const isLive = () => /open|polling/.test(client.state);

  function onState() {
    if (isLive() !== wasLive) {
      wasLive = !wasLive;
      (wasLive ? onConnect : onDisconnect)?.(client);
    }
    for (const watcher of [...watchers]) watcher(client);
  }

  const complain = (error) => onError?.(error);
  const store = createStore({ since: options.since, changed: () => connection.changed(), shown: (job) => onProgress?.(job) });
  const connection = createConnection({ http, store, options, onState, complain });

  const jobPath = (jobId) => `api/v2/jobs/${encodeURIComponent(jobId)}`;

  const client = {
    get state() {
      return connection.state();
    },
    get transport() {
      return connection.transport();
    },
    get error() {
      return connection.error();
    },
    get live() {
      return isLive();
    },

    watch(what, callback, { signal } = {}) {
      if (callback && typeof callback !== "function") [callback, signal] = [undefined, callback.signal];
      const closers = new Set();
      let closed = false;
      function close() {
        closed = true;
        signal?.removeEventListener("abort", close);
        for (const closer of [...closers]) closer();
      }
      if (signal?.aborted) closed = true;
      else {
        signal?.addEventListener("abort", close);
        if (callback) closers.add(store.listen(what, callback));
      }
      return {
        close,
        get live() {
          return isLive() && !closed;
        },
        get jobs() {
          return store.known(what);
        },
        [Symbol.asyncIterator]: () => iterate(what, closers, () => closed),
      };
    },

    async snapshot(jobId) {
      if (isLive() && store.get(jobId)) return { ...store.get(jobId), live: true };
      return { ...(await http.json(jobPath(jobId))), live: true };
    },

    done(jobId, { signal } = {}) {
      return new Promise((resolve, reject) => {
        const settle = (how, value) => {
          watch.close();
          off();
          signal?.removeEventListener("abort", aborted);
          how(value);
        };
        const aborted = () => settle(reject, signal.reason);
        const watch = client.watch(jobId, (job) => {
          if (job.type === "job_deleted") settle(reject, new StatusError("job_deleted", `${jobId} was deleted`));
          else if (hasEnded(job)) settle(resolve, job);
        });
        const closed = () => client.state === "closed" && settle(reject, client.error ?? new StatusError("closed", "the client is disconnected"));
        const off = client.onState(closed);
        signal?.addEventListener("abort", aborted);
        if (signal?.aborted) aborted();
        else closed();
      });
    },

    cancel: async (jobId) => (await http.json(`${jobPath(jobId)}/cancel`, { method: "POST" })).job,

    async ack(id) {
      await http.request("api/sse/ack", { method: "POST", body: { type: "ack", id } });
    },

    onState(callback) {
      watchers.add(callback);
      return () => watchers.delete(callback);
    },

    reconnect: () => connection.restart(),
    disconnect: () => connection.stop(),
  };

  function iterate(what, closers, isClosed) {
    const queue = [];
    const single = typeof what === "string";
    let over = isClosed();
    let wake;
    let failure;

    const push = (job) => {
      if (over) return;
      // Whoever takes them slowly gets the newest of each job.
      if (queue.length >= QUEUE) {
        const older = queue.findIndex((one) => one.jobId === job.jobId);
        if (older >= 0) queue.splice(older, 1);
      }
      queue.push(job);
      if (single && (hasEnded(job) || job.type === "job_deleted")) end();
      wake?.();
    };
    const stop = over ? () => {} : store.listen(what, push);
    const off = client.onState(() => {
      if (client.state !== "closed") return;
      failure = client.error;
      end();
    });
    function end() {
      over = true;
      stop();
      off();
      closers.delete(end);
      wake?.();
    }
    closers.add(end);

    return {
      async next() {
        while (!queue.length && !over) await new Promise((resolve) => (wake = resolve));
        if (queue.length) return { done: false, value: queue.shift() };
        if (failure) {
          const error = failure;
          failure = undefined;
          throw error;
        }
        return { done: true, value: undefined };
      },
      async return() {
        end();
        queue.length = 0;
        return { done: true, value: undefined };
      },
    };
  }

  connection.start();
  return client;
}
