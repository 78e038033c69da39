// What the tests in Node share: waiting, and servers that say whatever they are told to.

import { createServer } from "node:http";

import { connect } from "../../server/web/client.js";

const wait = globalThis.setTimeout; // tests may put another one in its place

export const within = (promise) => Promise.race([promise, new Promise((_, reject) => wait(reject, 20_000, new Error("too late")).unref())]);

/** Wait until something is so. */
export const until = (condition) =>
  within(
    (async () => {
      while (!condition()) await new Promise((resolve) => wait(resolve, 5));
    })(),
  );

/** A client that is disconnected when the test ends. */
export function client(t, options) {
  const made = connect({ reconnectDelay: 50, onError: (error) => t.diagnostic(String(error)), ...options });
  t.after(() => made.disconnect());
  return made;
}

/** Put something in the place of a global, for as long as the test lasts. */
export function replace(t, name, value, owner = globalThis) {
  const before = owner[name];
  owner[name] = value;
  t.after(() => (owner[name] = before));
}

/** A server that answers as it is told, for as long as the test lasts; `asked` are the times of its requests. */
export async function pretend(t, answer) {
  const asked = [];
  const server = createServer((request, response) => {
    asked.push(Date.now());
    answer(request, response, asked.length);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close() && server.closeAllConnections());
  return { url: `http://127.0.0.1:${server.address().port}`, asked };
}

/**
 * WebSockets without a network, for as long as the test lasts. `hear(socket, message)` is called with all that is sent
 * over one, and at first with `{type: "open"}`; it may `socket.say(message)` and `socket.end(code, reason)`.
 */
export function pretendSockets(t, hear) {
  const made = [];
  class Socket {
    readyState = 1;
    sent = [];
    constructor() {
      made.push(this);
      this.hear({ type: "open" });
    }
    hear(message) {
      setImmediate(() => {
        if (this.readyState !== 1) return;
        if (message.type === "open") this.onopen();
        hear(this, message);
      });
    }
    send(text) {
      this.sent.push(JSON.parse(text));
      this.hear(this.sent.at(-1));
    }
    say = (message) => this.onmessage({ data: typeof message === "string" ? message : JSON.stringify(message) });
    end(code = 1006, reason = "") {
      this.readyState = 3;
      this.onclose({ code, reason });
    }
    close() {
      this.readyState = 3;
    }
  }
  replace(t, "WebSocket", Socket);
  return made;
}

/** A server that does what is asked of it, and knows these jobs. */
export const polite = (...jobs) => (socket, { type, ref, jobIds = [], last_seen }) => {
  if (type === "open") socket.say({ type: "connected", heartbeat: 30, id: "e:1" });
  if (type === "subscribe") socket.say({ type: "subscribed", ref, jobIds, denied: [], snapshot: jobs, id: "e:1", recovered: last_seen !== undefined });
};

export const record = (jobId, version, more) => ({
  jobId,
  userId: "anonymous",
  status: "processing",
  progress: version,
  version,
  createdAt: "2026-01-31T12:00:00Z",
  ...more,
});
