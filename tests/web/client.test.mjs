// The client in Node, against the server at STATUSWIRE_URL. Run by test_node.py.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { describe, test } from "node:test";

import { connect } from "../../server/web/client.js";

const url = process.env.STATUSWIRE_URL;
const transports = globalThis.WebSocket ? ["websocket", "sse", "longpoll", "poll"] : ["sse", "longpoll", "poll"];
let number = 0;

async function say(method, path, body) {
  const headers = { "content-type": "application/json" };
  const answer = await fetch(url + path, { method, headers, body: body && JSON.stringify(body) });
  assert.ok(answer.ok, `${method} ${path}: ${answer.status}`);
  return answer.status === 204 ? null : answer.json();
}

const publish = (jobId, fields) => say("POST", `/api/v2/jobs/${jobId}/updates`, { userId: "anonymous", ...fields });
const newId = (name) => `${name}-${(number += 1)}`;
const within = (promise) => Promise.race([promise, new Promise((_, reject) => setTimeout(reject, 20_000, new Error("too late")).unref())]);

/** A client that is disconnected when the test ends. */
function client(t, options) {
  const made = connect({ url, reconnectDelay: 50, onError: (error) => t.diagnostic(String(error)), ...options });
  t.after(() => made.disconnect());
  return made;
}

const until = (made, state) =>
  within(
    new Promise((resolve) => {
      const look = () => made.state === state && (off(), resolve());
      const off = made.onState(look);
      look();
    }),
  );

/** A server that answers as it is told, for as long as the test lasts; `asked` are the times of its requests. */
async function pretend(t, answer) {
  const asked = [];
  const server = createServer((request, response) => {
    asked.push(Date.now());
    answer(request, response, asked.length);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close() && server.closeAllConnections());
  return { url: `http://127.0.0.1:${server.address().port}`, asked };
}

const more = (asked, count) =>
  within(
    (async () => {
      while (asked.length < count) await new Promise((resolve) => setTimeout(resolve, 5));
    })(),
  );

describe("the client", { concurrency: 8 }, () => {
  for (const transport of transports) {
    test(`${transport}: from the first state to the end, each version once`, async (t) => {
      const jobId = newId(transport);
      await publish(jobId, { status: "processing", progress: 5 });
      const made = client(t, { transports: [transport] });
      const seen = [];
      for await (const job of made.watch(jobId)) {
        seen.push(job.version);
        if (seen.length < 4) await publish(jobId, seen.length < 3 ? { progress: 10 * seen.length } : { status: "completed" });
      }
      assert.deepEqual(seen, [1, 2, 3, 4]);
      assert.equal((await within(made.done(jobId))).status, "completed");
      assert.equal(made.transport, transport);
      assert.equal(made.state, transport === "sse" || transport === "websocket" ? "open" : "polling");
    });

    test(`${transport}: jobs that come later, a user's jobs, and one that is deleted`, async (t) => {
      const [one, two, user] = [newId("one"), newId("two"), newId("user")];
      const made = client(t, { transports: [transport] });
      const heard = [];
      const waiters = [];
      const note = (job) => {
        heard.push(`${job.jobId}:${job.type === "job_deleted" ? "gone" : job.version}`);
        for (const waiter of waiters) waiter();
      };
      const come = (text) => within(new Promise((resolve) => {
        const look = () => heard.includes(text) && resolve();
        waiters.push(look);
        look();
      }));
      made.watch(one, note);
      await until(made, transport === "sse" || transport === "websocket" ? "open" : "polling");
      await publish(one, { userId: user, progress: 1 });
      await come(`${one}:1`);
      await publish(two, { userId: user, progress: 1 });
      made.watch({ user }, note);
      await come(`${two}:1`);
      await publish(two, { progress: 2, userId: user });
      await come(`${two}:2`);
      await say("DELETE", `/api/v2/jobs/${two}`);
      await come(`${two}:gone`);
      assert.deepEqual(made.watch({ user }).jobs.map((job) => job.jobId), [one]);
    });

    test(`${transport}: notifications of a channel, once each`, async (t) => {
      const channel = newId("channel");
      const made = client(t, { transports: [transport] });
      const heard = [];
      const three = new Promise((resolve) => made.watch({ channel }, ({ event, data }) => {
        heard.push(`${event} ${data}`);
        if (heard.length === 3) resolve();
      }));
      await until(made, transport === "sse" || transport === "websocket" ? "open" : "polling");
      for (const data of [1, 2, 3]) await say("POST", "/api/sse/message", { target: "channel", targetId: channel, event: "news", data });
      await within(three);
      assert.deepEqual(heard, ["news 1", "news 2", "news 3"]);
    });
  }

  test("a cancel is asked for", async (t) => {
    const jobId = newId("cancel");
    await publish(jobId, { status: "processing" });
    const made = client(t);
    assert.equal((await made.cancel(jobId)).cancelRequested, true);
    assert.equal((await made.snapshot(jobId)).cancelRequested, true);
    await assert.rejects(made.cancel("nothing-like-it"), { code: "job_not_found", status: 404 });
  });

  test("an aborted watch hears nothing more", async (t) => {
    const jobId = newId("abort");
    const made = client(t);
    const stopped = new AbortController();
    const heard = [];
    made.watch(jobId, (job) => heard.push(job.version), { signal: stopped.signal });
    const other = made.watch(jobId)[Symbol.asyncIterator]();
    await publish(jobId, { progress: 1 });
    await within(other.next());
    stopped.abort();
    await publish(jobId, { progress: 2 });
    await within(other.next());
    assert.deepEqual(heard, [1]);
    const watch = made.watch(jobId);
    const loop = watch[Symbol.asyncIterator]();
    await within(loop.next());
    const waiting = loop.next();
    watch.close();
    assert.equal((await within(waiting)).done, true);
  });

  test("the other forms of the file have the same in them", () => {
    const common = createRequire(import.meta.url)("../../server/web/client.cjs");
    assert.equal(typeof common.connect, "function");
    assert.equal(new common.StatusError("code", "text").code, "code");
  });

  test("Retry-After is obeyed, and nothing else is tried meanwhile", async (t) => {
    const { url, asked } = await pretend(t, (request, response) => response.writeHead(503, { "retry-after": "1" }).end());
    client(t, { url, transports: ["sse", "longpoll", "poll"], reconnectDelay: 1 });
    await more(asked, 2);
    assert.ok(asked[1] - asked[0] >= 990, String(asked[1] - asked[0]));
  });

  test("retry: of a stream that ends is obeyed", async (t) => {
    const { url, asked } = await pretend(t, (request, response) => {
      response.writeHead(200, { "content-type": "text/event-stream" });
      response.end('retry: 700\ndata: {"type":"connected","heartbeat":30}\n\ndata: {"type":"error","code":"try_later","message":"full"}\n\n');
    });
    const made = client(t, { url, transports: ["sse"], reconnectDelay: 1 });
    made.watch({ all: true }, () => {});
    await more(asked, 2);
    assert.ok(asked[1] - asked[0] >= 690, String(asked[1] - asked[0]));
  });

  test("waits grow and are random, and it gives up when it shall", async (t) => {
    const { url, asked } = await pretend(t, (request, response) => response.destroy());
    const made = client(t, { url, transports: ["poll"], reconnectDelay: 40, maxReconnectAttempts: 5 });
    await until(made, "closed");
    assert.equal(made.error.code, "gave_up");
    assert.equal(asked.length, 6);
    const waits = asked.slice(1).map((at, index) => at - asked[index]);
    waits.forEach((wait, index) => assert.ok(wait <= 40 * 2 ** (index + 1) + 250, String(waits)));
    await assert.rejects(made.done("job"), { code: "gave_up" });
  });

  test("Retry-After is obeyed even if the page wakes meanwhile, and has an end", async (t) => {
    // Longer than timers can wait: it must not come out as no wait at all.
    for (const after of ["2", "99999999999"]) {
      const { url, asked } = await pretend(t, (request, response) => response.writeHead(503, { "retry-after": after }).end());
      const listeners = new Map();
      globalThis.addEventListener = (type, listener) => listeners.set(type, listener);
      const made = client(t, { url, transports: ["poll"], reconnectDelay: 1 });
      delete globalThis.addEventListener;
      await until(made, "offline");
      assert.equal(asked.length, 1);
      for (let turn = 0; turn < 3; turn += 1) {
        listeners.get("online")();
        await new Promise((resolve) => setTimeout(resolve, 100));
      }
      assert.equal(asked.length, 1, after);
      if (after !== "2") continue;
      await more(asked, 2);
      assert.ok(asked[1] - asked[0] >= 1990, String(asked[1] - asked[0]));
    }
  });

  test("a short life makes no failure forgotten", async (t) => {
    // The sixth time it is connected, for less than what counts.
    const { url, asked } = await pretend(t, (request, response, count) => {
      if (count !== 6) return response.destroy();
      response.writeHead(200, { "content-type": "application/json" });
      response.end(JSON.stringify({ updates: [], last_seen: "e:1", reset: false }));
    });
    const random = Math.random;
    Math.random = () => 1; // the longest there is
    t.after(() => (Math.random = random));
    const made = client(t, { url, transports: ["poll"], reconnectDelay: 10 });
    made.watch("job", () => {});
    await more(asked, 8);
    const waits = asked.slice(1).map((at, index) => at - asked[index]);
    for (const [failures, wait] of waits.slice(0, 5).entries()) assert.ok(wait >= 20 * 2 ** failures - 2, String(waits));
    assert.ok(waits[6] >= 318, String(waits));
  });

  test("a token that cannot be had is told as that, and tried for again", async (t) => {
    let asked = 0;
    const errors = [];
    const made = client(t, {
      onError: ({ code, message }) => errors.push(`${code}: ${message}`),
      getToken() {
        asked += 1;
        if (asked === 1) throw new Error("nobody is logged in");
        if (asked === 2) return Promise.reject();
        return "of.no.use";
      },
    });
    await within(new Promise((resolve) => made.onState(() => made.live && resolve())));
    assert.deepEqual(errors, ["no_token: nobody is logged in", "no_token: no_token"]);
    assert.equal(asked, 3);
  });

  test("a token that never comes does not hold up the next one", { timeout: 60_000 }, async (t) => {
    let asked = 0;
    const made = client(t, { getToken: () => (asked += 1) === 1 ? new Promise(() => {}) : "of.no.use" });
    await new Promise((resolve) => made.onState(() => made.live && resolve()));
    assert.ok(asked >= 2);
  });

  test("without autoReconnect every transport is tried once, and that is all", async (t) => {
    const { url, asked } = await pretend(t, (request, response) => response.destroy());
    const made = client(t, { url, transports: ["sse", "longpoll", "poll"], autoReconnect: false });
    await until(made, "closed");
    assert.equal(asked.length, 3);
  });

  test("without autoReconnect one failure is the end", async (t) => {
    const { url, asked } = await pretend(t, (request, response) => response.destroy());
    const made = client(t, { url, transports: ["poll"], autoReconnect: false });
    await until(made, "closed");
    assert.equal(asked.length, 1);
  });

  test("since a cursor there is what came after it, and no state", async (t) => {
    const jobId = newId("since");
    await publish(jobId, { progress: 1 });
    const { id } = await publish(jobId, { progress: 2 });
    await publish(jobId, { progress: 3 });
    for (const transport of transports) {
      const made = client(t, { since: id, transports: [transport] });
      const heard = [];
      for await (const job of made.watch(jobId)) {
        heard.push(job.version);
        break;
      }
      assert.deepEqual(heard, [3], transport);
    }
  });

  test("what may not be watched is told and spoils nothing else", async (t) => {
    const jobId = newId("allowed");
    const errors = [];
    const made = client(t, { onError: ({ code }) => errors.push(code) });
    made.watch({ user: "not an id" }, () => {});
    const other = made.watch(jobId)[Symbol.asyncIterator]();
    await publish(jobId, { progress: 1 });
    assert.equal((await within(other.next())).value.progress, 1);
    assert.deepEqual(errors, ["invalid_parameter"]);
    assert.equal(made.live, true);
  });
});

// A snapshot in two messages, and the connection ends between them: half of it is no state of anything.
describe("a snapshot that is cut off", () => {
  const record = (jobId, version) => ({ jobId, userId: "anonymous", status: "processing", progress: version, version, createdAt: "2026-01-31T12:00:00Z" });
  const [a, b] = [record("a", 1), record("b", 1)];

  async function watched(made) {
    const seen = [];
    const watch = made.watch({ all: true }, ({ jobId, version }) => seen.push(`${jobId}${version}`));
    await until(made, "open");
    return { seen, known: watch.jobs.map(({ jobId }) => jobId) };
  }

  test("over an event stream", async (t) => {
    const cursors = [];
    const { url } = await pretend(t, (request, response, count) => {
      cursors.push(request.headers["last-event-id"] ?? new URL(request.url, "http://x").searchParams.get("last_seen"));
      response.writeHead(200, { "content-type": "text/event-stream" });
      const send = (message, id = "") => response.write(`${id}data: ${JSON.stringify(message)}\n\n`);
      send({ type: "connected", heartbeat: 30 });
      if (count === 1) send({ type: "snapshot", jobs: [a, record("gone", 1)], more: true });
      if (count === 1) return setTimeout(() => response.destroy(), 50);
      send({ type: "snapshot", jobs: [record("a", 2)], more: true });
      send({ type: "snapshot", jobs: [b] }, "id: e:5\n");
    });
    const { seen, known } = await watched(client(t, { url, transports: ["sse"], reconnectDelay: 1 }));
    assert.deepEqual([seen, known, cursors], [["a2", "b1"], ["a", "b"], [null, null]]);
  });

  test("over a WebSocket", async (t) => {
    const subscribed = [];
    class Socket {
      readyState = 1;
      constructor() {
        setTimeout(() => this.say({ type: "connected", heartbeat: 30, id: "e:4" }));
      }
      say = (message) => this.onmessage({ data: JSON.stringify(message) });
      send(text) {
        const { type, ref, last_seen } = JSON.parse(text);
        if (type !== "subscribe") return;
        subscribed.push(last_seen);
        const part = (rest) => this.say({ type: "subscribed", ref, ...rest });
        const whole = { jobIds: [], denied: [], recovered: false, id: "e:5" };
        setTimeout(() => {
          part({ snapshot: [subscribed.length === 1 ? record("gone", 1) : record("a", 2)], more: true });
          if (subscribed.length === 1) this.onclose({ code: 1006, reason: "" });
          else part({ snapshot: [b], ...whole });
        });
      }
      close() {}
    }
    const real = globalThis.WebSocket;
    globalThis.WebSocket = Socket;
    t.after(() => (globalThis.WebSocket = real));
    const { seen, known } = await watched(client(t, { transports: ["websocket"], reconnectDelay: 1 }));
    assert.deepEqual([seen, known, subscribed], [["a2", "b1"], ["a", "b"], [undefined, undefined]]);
  });
});
