// The client: one connection, however many watch over it. What it does for its users is in client.d.ts.

import { createConnection } from "./connection.js";
import { StatusError, createHttp } from "./http.js";
import { call, createStore, hasEnded, topicOf } from "./store.js";

export { StatusError };

const QUEUE = 1000;
const HERE = import.meta.url;

export function connect(options = {}) {
  const { url = HERE && new URL(".", HERE), getToken, since, onProgress, onError, onConnect, onDisconnect } = options;
  const base = new URL(url ?? "/", globalThis.location?.href);
  if (!base.pathname.endsWith("/")) base.pathname += "/";
  const http = createHttp(base, getToken);
  const watchers = new Set();
  const complain = (error) => call(onError, error);
  const store = createStore({ since, changed: () => way.changed(), learned: () => client.live && tell(), shown: onProgress });
  const parts = { http, store, options, onState, complain, StatusError };
  parts.connection = createConnection({
    ...parts,
    store: { ...store, apply: (...heard) => (store.apply(...heard), way.relay?.(...heard)) },
    onState: (now) => (way.told ?? onState)(now),
  });
  let way = parts.connection; // or what stands in for it
  let loading;
  let wanted;

  async function start() {
    wanted = true;
    if (options.share && way === parts.connection && globalThis.document && navigator.locks) {
      // Most pages do without: it is a file of its own.
      way = await (loading ??= import("./share.js").then((share) => share.createShare(parts), (error) => (complain(error), way)));
    }
    if (wanted) way.start();
  }

  function stop() {
    wanted = false;
    way.stop();
  }

  function onState(now) {
    const wasLive = client.live;
    // Open or polling.
    Object.assign(client, now, { live: /p/.test(now.state) });
    if (client.live !== wasLive) call(wasLive ? onDisconnect : onConnect, client);
    tell();
  }

  function tell() {
    for (const watcher of [...watchers]) call(watcher, client);
  }

  const ask = (jobId, what = "", method) => http.json(`api/v2/jobs/${encodeURIComponent(jobId)}${what}`, { method });

  async function* iterate(what, signal) {
    const queue = [];
    const only = typeof what === "string";
    let over;
    let wake;
    const note = () => wake?.();
    const stop = store.listen(topicOf(what), (news) => {
      // Whoever takes them slowly gets the newest of each job.
      const older = queue.length < QUEUE ? -1 : queue.findIndex((one) => one.jobId === news.jobId);
      if (older >= 0) queue.splice(older, 1);
      queue.push(news);
      if (only && (hasEnded(news) || news.type === "job_deleted")) over = true;
      note();
    });
    const off = client.onState(note);
    signal.addEventListener("abort", note);
    try {
      for (;;) {
        while (queue.length) yield queue.shift();
        // By now whoever has closed it may have reconnected.
        if (over || signal.aborted || client.state === "closed") break;
        await new Promise((resolve) => (wake = resolve));
      }
      if (client.error && client.state === "closed") throw client.error;
    } finally {
      stop();
      off();
      signal.removeEventListener("abort", note);
    }
  }

  const client = {
    state: "connecting",
    transport: null,
    live: false,

    watch(what, callback, given) {
      const listens = typeof callback === "function";
      const { signal } = (listens ? given : callback) ?? {};
      const closing = new AbortController();
      const over = AbortSignal.any([closing.signal, signal ?? closing.signal]);
      if (listens && !over.aborted) over.addEventListener("abort", store.listen(topicOf(what), callback));
      return {
        close: () => closing.abort(),
        get live() {
          return client.live && !over.aborted && !!store.topics.get(topicOf(what))?.synced;
        },
        get jobs() {
          return store.known(topicOf(what));
        },
        [Symbol.asyncIterator]: () => iterate(what, over),
      };
    },

    async snapshot(jobId) {
      return { ...((client.live && store.get(jobId)) || (await ask(jobId))), live: true };
    },

    async done(jobId, watching) {
      for await (const job of client.watch(jobId, watching)) {
        if (hasEnded(job)) return job;
        if (job.type === "job_deleted") throw new StatusError(job.type);
      }
      watching?.signal?.throwIfAborted();
      throw new StatusError("closed");
    },

    cancel: async (jobId) => (await ask(jobId, "/cancel", "POST")).job,

    ack: (id) => http.json("api/sse/ack", { method: "POST", body: { type: "ack", id } }),

    onState(callback) {
      watchers.add(callback);
      return () => watchers.delete(callback);
    },

    reconnect() {
      stop();
      start();
    },
    disconnect: stop,
  };

  start();
  return client;
}
