// The client in Node, against servers that do as they are told here: slow ones, stopping ones, and such that lie. Run
// by test_node.py. One test at a time, as some put something of their own in the place of what Node has.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { describe, test } from "node:test";
import v8 from "node:v8";
import vm from "node:vm";

import { connect } from "../../server/web/client.js";
import { client, polite, pretend, pretendSockets, record, replace, until, within } from "./node_tools.mjs";

const stream = { "content-type": "text/event-stream" };
const json = { "content-type": "application/json" };
const refuse = (request, response) => response.destroy();
const events = (...messages) => messages.map((message) => `data: ${JSON.stringify(message)}\n\n`).join("");
const connected = { type: "connected", heartbeat: 30 };

/** Timers run at once from now on; how long they were to take. */
function withoutWaiting(t) {
  const waits = [];
  const { setTimeout } = globalThis;
  replace(t, "setTimeout", (call, ms, ...rest) => {
    waits.push(ms);
    return setTimeout(call, Math.min(ms, 1), ...rest);
  });
  return waits;
}

/** Time passes when `pass(ms)` is called, and `sleep(ms)`: without anything being done in it. */
function ownTime(t) {
  let ahead = 0;
  let tick;
  const { now } = Date;
  replace(t, "now", () => now() + ahead, Date);
  replace(t, "setInterval", (call) => ((tick = call), 0));
  const sleep = (ms) => {
    ahead += ms;
    tick();
  };
  return {
    sleep,
    pass(ms) {
      for (; ms > 0; ms -= 4000) sleep(4000);
    },
  };
}

/** The events that a page would hear of; each is a function. */
function listenable(t) {
  const listeners = new Map();
  replace(t, "addEventListener", (type, listener) => listeners.set(type, listener));
  return listeners;
}

describe("how long it waits", () => {
  test("a random part of half a second, then of twice as much each time, up to 20 seconds", async (t) => {
    const parts = [0.25, 0.9, 0.5, 1, 0, 0.75, 1, 0.1, 0.999];
    let turn = 0;
    replace(t, "random", () => parts[turn++ % parts.length], Math);
    pretendSockets(t, (socket) => socket.end());
    const waits = withoutWaiting(t);
    client(t, { transports: ["websocket"], reconnectDelay: undefined });
    await until(() => waits.length >= parts.length);
    const most = [500, 1000, 2000, 4000, 8000, 16_000, 20_000, 20_000, 20_000];
    assert.deepEqual(waits.slice(0, parts.length), parts.map((part, index) => part * most[index]));
  });

  test("reconnectDelay is where it begins", async (t) => {
    replace(t, "random", () => 1, Math);
    pretendSockets(t, (socket) => socket.end());
    const waits = withoutWaiting(t);
    client(t, { transports: ["websocket"], reconnectDelay: 70 });
    await until(() => waits.length >= 3);
    assert.deepEqual(waits.slice(0, 3), [70, 140, 280]);
  });

  test("only a connection that lasts makes it forget its failures", async (t) => {
    replace(t, "random", () => 1, Math);
    const { pass } = ownTime(t);
    const lives = [0, 0, 0, 0, "short", 0, "long", 0, 0];
    const made = pretendSockets(t, (socket, message) => {
      const life = lives[made.indexOf(socket)];
      if (!life) return socket.end();
      polite()(socket, message);
      if (message.type !== "subscribe") return;
      if (life === "long") pass(4000);
      socket.end();
    });
    const waits = withoutWaiting(t);
    client(t, { transports: ["websocket"], reconnectDelay: 10 }).watch("job", () => {});
    await until(() => waits.length >= lives.length);
    assert.deepEqual(waits.slice(0, lives.length), [10, 20, 40, 80, 160, 160, 10, 20, 40]);
  });

  test("short lives, one after the other, make it no more patient than a few failures do", async (t) => {
    replace(t, "random", () => 1, Math);
    pretendSockets(t, (socket, message) => {
      polite()(socket, message);
      if (message.type === "subscribe") socket.end();
    });
    const waits = withoutWaiting(t);
    client(t, { transports: ["websocket"], reconnectDelay: 10 }).watch("job", () => {});
    await until(() => waits.length >= 6);
    assert.deepEqual(waits.slice(0, 6), [10, 20, 40, 40, 40, 40]);
  });

  test("as long as a server that stops says, even if the page wakes or the network changes meanwhile", async (t) => {
    const { url, asked } = await pretend(t, refuse);
    const ends = [];
    const made = pretendSockets(t, (socket, message) => {
      polite()(socket, message);
      if (message.type === "subscribe" && made.length === 1) ends.push(Date.now()), socket.end(1001, "the server stops, come back in 700 ms");
      if (message.type === "subscribe" && made.length === 2) ends.push(Date.now());
    });
    const listeners = listenable(t);
    const one = client(t, { url, transports: ["websocket", "poll"], reconnectDelay: 1 });
    one.watch("job", () => {});
    await until(() => ends.length === 1 && !one.live);
    assert.equal(one.error.delay, 700);
    listeners.get("offline")();
    listeners.get("online")();
    await until(() => ends.length === 2);
    assert.ok(ends[1] - ends[0] >= 690, String(ends[1] - ends[0]));
    assert.equal(asked.length, 0, "no other way to a server that stops");
  });

  test("Retry-After is obeyed, and nothing else is tried meanwhile", async (t) => {
    const { url, asked } = await pretend(t, (request, response) => response.writeHead(503, { "retry-after": "1" }).end());
    client(t, { url, transports: ["sse", "longpoll", "poll"], reconnectDelay: 1 });
    await until(() => asked.length === 2);
    assert.ok(asked[1] - asked[0] >= 990, String(asked[1] - asked[0]));
  });

  test("Retry-After may be a date", async (t) => {
    const { url, asked } = await pretend(t, (request, response) =>
      response.writeHead(503, { "retry-after": new Date(Date.now() + 1500).toUTCString() }).end());
    client(t, { url, transports: ["poll"], reconnectDelay: 1 });
    await until(() => asked.length === 2);
    // It counts in whole seconds.
    assert.ok(asked[1] - asked[0] >= 490, String(asked[1] - asked[0]));
  });

  test("retry: of a stream that ends is obeyed", async (t) => {
    const { url, asked } = await pretend(t, (request, response) => {
      response.writeHead(200, stream);
      response.end(`retry: 700\n${events(connected, { type: "error", code: "try_later", message: "full" })}`);
    });
    client(t, { url, transports: ["sse"], reconnectDelay: 1 }).watch({ all: true }, () => {});
    await until(() => asked.length === 2);
    assert.ok(asked[1] - asked[0] >= 690, String(asked[1] - asked[0]));
  });

  test("Retry-After is obeyed even if the page wakes meanwhile, and has an end", async (t) => {
    const listeners = listenable(t);
    // Longer than timers can wait: it must not come out as no wait at all.
    for (const after of ["2", "99999999999"]) {
      const { url, asked } = await pretend(t, (request, response) => response.writeHead(503, { "retry-after": after }).end());
      const made = client(t, { url, transports: ["poll"], reconnectDelay: 1 });
      await until(() => made.state === "offline");
      assert.equal(asked.length, 1);
      for (let turn = 0; turn < 3; turn += 1) {
        listeners.get("online")();
        await new Promise((resolve) => setTimeout(resolve, 100));
      }
      assert.equal(asked.length, 1, after);
      if (after !== "2") continue;
      await until(() => asked.length === 2);
      assert.ok(asked[1] - asked[0] >= 1990, String(asked[1] - asked[0]));
    }
  });

  test("it gives up when it shall", async (t) => {
    const { url, asked } = await pretend(t, refuse);
    const made = client(t, { url, transports: ["poll"], reconnectDelay: 1, maxReconnectAttempts: 5 });
    await until(() => made.state === "closed");
    assert.equal(made.error.code, "gave_up");
    assert.equal(made.error.cause.code, "unreachable");
    assert.equal(asked.length, 6);
    await assert.rejects(made.done("job"), { code: "gave_up" });
    made.reconnect();
    await until(() => asked.length === 12 && made.state === "closed");
  });

  test("without autoReconnect every transport is tried once, and that is all", async (t) => {
    const { url, asked } = await pretend(t, refuse);
    const made = client(t, { url, transports: ["sse", "longpoll", "poll"], autoReconnect: false });
    await until(() => made.state === "closed");
    assert.equal(asked.length, 3);
  });

  test("without autoReconnect one connection that is lost is the end", async (t) => {
    const made = pretendSockets(t, polite());
    const one = client(t, { transports: ["websocket"], autoReconnect: false });
    await until(() => one.live);
    made[0].end();
    assert.equal(one.state, "closed");
    assert.equal(one.error.code, "closed");
  });
});

describe("what a server says", () => {
  const good = [record("job", 1)];
  const poll = (updates) => JSON.stringify({ updates, last_seen: "e:1", reset: false, timedOut: false, done: false });
  const nonsense = ["<h1>Welcome</h1>", "", "null", "7", '{"type":"subscribed"}', '{"type":"snapshot"}', '{"updates":7}', "\0".repeat(100)];

  // What it hears makes sense from the third connection on.
  for (const text of nonsense) {
    const named = JSON.stringify(text.slice(0, 20));

    test(`over a WebSocket, nonsense: ${named}`, async (t) => {
      const made = pretendSockets(t, (socket, message) => {
        if (made.length < 3) socket.say(text);
        polite(...good)(socket, message);
      });
      const seen = [];
      const one = client(t, { transports: ["websocket"], reconnectDelay: 1 });
      one.watch("job", ({ version }) => seen.push(version));
      await until(() => one.live);
      assert.deepEqual(seen, [1]);
    });

    for (const transport of ["sse", "longpoll", "poll"]) {
      test(`by ${transport}, nonsense: ${named}`, async (t) => {
        const { url, asked } = await pretend(t, (request, response) => {
          const isStream = request.url.includes("/stream");
          response.writeHead(200, isStream ? stream : json);
          if (asked.length < 3) return response.end(isStream ? `data: ${text}\n\n` : text);
          if (isStream) response.write(`id: e:1\n${events(connected, { type: "snapshot", jobs: good })}`);
          else if (!/last_seen/.test(request.url)) response.end(poll(good));
          else setTimeout(() => response.end(poll([])), 20);
        });
        const seen = [];
        const one = client(t, { url, transports: [transport], reconnectDelay: 1 });
        one.watch("job", ({ version }) => seen.push(version));
        await until(() => one.live);
        assert.deepEqual(seen, [1]);
      });
    }
  }

  test("nonsense in the middle ends the connection, and nothing is missed", async (t) => {
    const made = pretendSockets(t, (socket, message) => {
      polite(...good)(socket, message);
      if (message.last_seen) socket.say({ type: "status_update", ...record("job", 2), id: "e:2" });
    });
    const seen = [];
    const one = client(t, { transports: ["websocket"], reconnectDelay: 1 });
    one.watch("job", ({ version }) => seen.push(version));
    await until(() => one.live);
    made[0].say('{"type":"status_update","jobId":"job","vers');
    assert.equal(one.live, false);
    await until(() => seen.length === 2);
    assert.deepEqual(made[1].sent.map(({ last_seen }) => last_seen), ["e:1"]);
    // Nor is the first one heard any more.
    made[0].say({ type: "status_update", ...record("job", 9), id: "e:9" });
    assert.deepEqual(seen, [1, 2]);
  });

  test("versions that are old, repeated, or from a job before", async (t) => {
    const made = pretendSockets(t, polite(record("job", 5)));
    const seen = [];
    const one = client(t, { transports: ["websocket"] });
    one.watch("job", ({ version, progress }) => seen.push([version, progress]));
    await until(() => one.live);
    const [socket] = made;
    for (const version of [4, 5, 6, 6, 3, 7]) socket.say({ type: "status_update", ...record("job", version), id: `e:${version}` });
    // The same version with other words; a job that was deleted long ago; the one that is there now.
    socket.say({ type: "status_update", ...record("job", 7, { progress: 99 }), id: "e:8" });
    socket.say({ type: "status_update", ...record("job", 50, { createdAt: "2025-01-31T12:00:00Z" }), id: "e:8" });
    socket.say({ type: "status_update", ...record("job", 1, { createdAt: "2027-01-31T12:00:00Z" }), id: "e:8" });
    assert.deepEqual(seen, [[5, 5], [6, 6], [7, 7], [1, 1]]);
  });

  test("a message of many megabytes", async (t) => {
    const made = pretendSockets(t, polite());
    const seen = [];
    const one = client(t, { transports: ["websocket"] });
    one.watch("job", (job) => seen.push(job.result.length));
    await until(() => one.live);
    made[0].say({ type: "status_update", ...record("job", 1, { result: "x".repeat(20_000_000) }), id: "e:2" });
    assert.deepEqual(seen, [20_000_000]);
  });

});

describe("silence", () => {
  const beating = (heartbeat) => (socket, message) =>
    message.type === "open" ? socket.say({ ...connected, heartbeat }) : polite()(socket, message);

  async function watching(t, hear) {
    const time = ownTime(t);
    const made = pretendSockets(t, hear);
    const one = client(t, { transports: ["websocket"], reconnectDelay: 1 });
    one.watch("job", () => {});
    await until(() => one.live);
    return { one, made, ...time };
  }

  for (const [heartbeat, seconds] of [[100, 200], [5, 10], ["soon", 60]]) {
    test(`of two heartbeats ends a connection, and no shorter one: ${heartbeat}`, async (t) => {
      const { one, made, pass } = await watching(t, beating(heartbeat));
      pass((seconds - 4) * 1000);
      assert.equal(one.live, true);
      pass(8000);
      assert.equal(one.live, false);
      assert.equal(one.error.code, "timeout");
      await until(() => one.live);
      assert.equal(made.length, 2);
    });
  }

  test("of a server that never began to speak", async (t) => {
    const { pass } = ownTime(t);
    pretendSockets(t, () => {});
    const one = client(t, { transports: ["websocket"] });
    pass(4000);
    assert.equal(one.state, "connecting");
    pass(4000);
    assert.deepEqual([one.state, one.error.code], ["offline", "timeout"]);
  });

  test("after sleep a connection has three seconds to show that it is alive", async (t) => {
    const { one, made, pass, sleep } = await watching(t, beating(100));
    const [socket] = made;
    sleep(60_000);
    assert.equal(socket.sent.at(-1).type, "ping");
    assert.equal(one.live, true, "no heartbeat is missing");
    socket.say({ type: "pong" });
    pass(8000);
    assert.equal(one.live, true);
    sleep(140_000);
    assert.equal(one.state, "connecting", "one is");
    socket.say({ type: "pong" });
    assert.equal(one.live, true);
    sleep(60_000);
    pass(4000);
    assert.equal(one.error.code, "timeout");
    await until(() => one.live);
    assert.equal(made.length, 2);
  });
});

// A snapshot in two messages, and the connection ends between them: half of it is no state of anything.
describe("a snapshot that is cut off", () => {
  const [a, b] = [record("a", 1), record("b", 1)];

  async function watched(made) {
    const seen = [];
    const watch = made.watch({ all: true }, ({ jobId, version }) => seen.push(`${jobId}${version}`));
    await until(() => made.live);
    return { seen, known: watch.jobs.map(({ jobId }) => jobId) };
  }

  test("over an event stream", async (t) => {
    const cursors = [];
    const { url } = await pretend(t, (request, response, count) => {
      cursors.push(request.headers["last-event-id"] ?? new URL(request.url, "http://x").searchParams.get("last_seen"));
      response.writeHead(200, stream);
      response.write(events(connected));
      if (count === 1) {
        response.write(events({ type: "snapshot", jobs: [a, record("gone", 1)], more: true }));
        return setTimeout(() => response.destroy(), 50);
      }
      response.write(events({ type: "snapshot", jobs: [record("a", 2)], more: true }));
      response.write(`id: e:5\n${events({ type: "snapshot", jobs: [b] })}`);
    });
    const { seen, known } = await watched(client(t, { url, transports: ["sse"], reconnectDelay: 1 }));
    assert.deepEqual([seen, known, cursors], [["a2", "b1"], ["a", "b"], [null, null]]);
  });

  test("over a WebSocket", async (t) => {
    const subscribed = [];
    const made = pretendSockets(t, (socket, message) => {
      const { type, ref, last_seen } = message;
      if (type === "open") return socket.say({ ...connected, id: "e:4" });
      subscribed.push(last_seen);
      socket.say({ type: "subscribed", ref, snapshot: [made.length === 1 ? record("gone", 1) : record("a", 2)], more: true });
      if (made.length === 1) return socket.end();
      polite(b)(socket, message);
    });
    const { seen, known } = await watched(client(t, { transports: ["websocket"], reconnectDelay: 1 }));
    assert.deepEqual([seen, known, subscribed], [["a2", "b1"], ["a", "b"], [undefined, undefined]]);
  });
});

describe("what it does for those who use it", () => {
  test("a token that never comes does not hold up the next one", async (t) => {
    const { timeout } = AbortSignal;
    replace(t, "timeout", (ms) => timeout(ms / 100), AbortSignal);
    const made = pretendSockets(t, polite());
    let asked = 0;
    const errors = [];
    const one = client(t, {
      getToken: () => ((asked += 1) === 1 ? new Promise(() => {}) : "of.no.use"),
      onError: ({ code }) => errors.push(code),
    });
    await until(() => one.live);
    assert.deepEqual([asked, errors], [2, ["no_token"]]);
    assert.deepEqual(made[0].sent, [{ type: "auth", token: "of.no.use" }]);
  });

  test("without WebSockets it takes the next best", async (t) => {
    replace(t, "WebSocket", undefined);
    const { url } = await pretend(t, (request, response) => response.writeHead(200, stream).write(`id: e:1\n${events(connected, { type: "snapshot", jobs: [record("job", 1)] })}`));
    const one = client(t, { url });
    const watch = one.watch("job", () => {});
    await until(() => one.live);
    assert.deepEqual([one.transport, watch.jobs.length], ["sse", 1]);
  });

  test("callbacks are given what they are for", async (t) => {
    const said = [];
    const made = pretendSockets(t, polite(record("job", 1), record("other", 1)));
    const one = client(t, {
      transports: ["websocket"],
      reconnectDelay: 1,
      onProgress: ({ jobId, version, type }) => said.push(`${type} ${jobId} ${version}`),
      onConnect: (client) => said.push(`connect ${client === one} ${client.state} ${client.transport}`),
      onDisconnect: (client) => said.push(`disconnect ${client === one} ${client.live} ${client.error?.code}`),
      onError: ({ name, code, message }) => said.push(`${name} ${code} ${message}`),
    });
    one.watch("job", () => {});
    await until(() => one.live);
    made[0].say({ type: "error", code: "rate_limited", message: "too much" });
    made[0].end(1006);
    await until(() => one.live);
    made[1].say({ type: "job_completed", ...record("job", 2, { status: "completed" }), id: "e:2" });
    one.disconnect();
    assert.deepEqual(said, [
      "snapshot job 1",
      "connect true open websocket",
      "StatusError rate_limited too much",
      "disconnect true false closed",
      "connect true open websocket",
      "job_completed job 2",
      "disconnect true false undefined",
    ]);
    assert.deepEqual([one.state, one.transport], ["closed", null]);
  });

  test("however many watch a job, it is asked for once, and left when the last one leaves", async (t) => {
    const made = pretendSockets(t, polite(record("job", 1)));
    const one = client(t, { transports: ["websocket"] });
    const heard = [0, 0, 0];
    const watches = heard.map((_, index) => one.watch("job", () => (heard[index] += 1)));
    await until(() => one.live);
    const late = one.watch("job", () => {});
    const loop = one.watch("job")[Symbol.asyncIterator]();
    assert.equal((await within(loop.next())).value.version, 1);
    const [socket] = made;
    const asked = () => socket.sent.map(({ type, jobIds }) => `${type} ${jobIds ?? ""}`);
    assert.deepEqual(asked(), ["subscribe job"]);
    one.watch("other", () => {}).close();
    watches[0].close();
    watches[1].close();
    late.close();
    const stop = new AbortController();
    const last = one.watch("job", () => {}, { signal: stop.signal });
    watches[2].close();
    await new Promise(setImmediate);
    assert.deepEqual(asked(), ["subscribe job"], "one still watches");
    assert.deepEqual(heard, [1, 1, 1]);
    await loop.return();
    assert.equal(last.live, true);
    stop.abort();
    assert.equal(last.live, false);
    await until(() => socket.sent.length === 2);
    assert.deepEqual(asked(), ["subscribe job", "unsubscribe job"]);
    assert.equal(made.length, 1);
  });

  test("what is not known yet is not live, though the connection is", async (t) => {
    let answer;
    const sockets = pretendSockets(t, (socket, message) => {
      const tell = () => polite()(socket, message);
      if (message.jobIds?.includes("late")) answer = tell;
      else tell();
    });
    const one = client(t, { transports: ["websocket"] });
    const early = one.watch("early", () => {});
    await until(() => one.live);
    assert.equal(early.live, true);
    const late = one.watch("late", () => {});
    const told = [];
    one.onState(() => told.push(late.live));
    await until(() => answer);
    assert.deepEqual([one.live, early.live, late.live, late.jobs], [true, true, false, []]);
    answer();
    assert.equal(late.live, true, "and there is no such job");
    assert.deepEqual(told, [true]);
    sockets[0].end();
    assert.deepEqual([early.live, late.live], [false, false]);
  });

  test("errors of what is asked once are told in the same words", async (t) => {
    const { url } = await pretend(t, (request, response) => {
      if (request.url.includes("html")) return response.writeHead(200, { "content-type": "text/html" }).end("<h1>Welcome</h1>");
      if (request.url.includes("gateway")) return response.writeHead(502).end("bad gateway");
      response.destroy();
    });
    const one = client(t, { url, transports: ["poll"] });
    await assert.rejects(one.snapshot("away"), { name: "StatusError", code: "unreachable" });
    await assert.rejects(one.cancel("html"), { name: "StatusError", code: "unreachable" });
    await assert.rejects(one.snapshot("gateway"), { name: "StatusError", code: "blocked", status: 502 });
    await assert.rejects(one.ack("e:1"), { name: "StatusError", code: "unreachable" });
  });

  test("what is declared is what there is", async (t) => {
    const types = readFileSync(new URL("../../server/web/client.d.ts", import.meta.url), "utf8");
    const declared = (name) => [...types.split(`export interface ${name}`)[1].split("\n}")[0].matchAll(/^  (?:readonly )?(\w+)\??[:(]/gm)].map(([, member]) => member);
    pretendSockets(t, polite());
    const asked = new Set();
    replace(t, "document", { hidden: true });
    const listeners = listenable(t);
    const options = { transports: ["websocket"], onConnect() {} };
    const one = connect(new Proxy(options, { get: (target, name) => (asked.add(name), target[name]) }));
    t.after(one.disconnect);
    const watch = one.watch("job", () => {});
    await until(() => one.live);
    listeners.get("visibilitychange")();
    assert.deepEqual([...asked].sort(), declared("Options").sort());
    assert.deepEqual(Object.keys(one).sort(), [...new Set(declared("Client"))].sort());
    assert.deepEqual(Object.keys(watch).sort(), declared("Watch").sort());
    assert.ok(watch[Symbol.asyncIterator]);
  });

  test("a long life takes no more memory than a short one", async (t) => {
    const made = pretendSockets(t, polite());
    const one = client(t, { transports: ["websocket"] });
    v8.setFlagsFromString("--expose-gc");
    const gc = vm.runInNewContext("gc");
    let heard = 0;
    one.watch({ all: true }, () => (heard += 1));
    one.watch({ channel: "" }, () => (heard += 1));
    await until(() => one.live);
    let offset = 1;
    const say = (message) => made[0].say({ id: `e:${(offset += 1)}`, ...message });
    async function live(jobs) {
      for (let number = 0; number < jobs; number += 1) {
        const jobId = `job-${offset}`;
        say({ type: "status_update", ...record(jobId, 1) });
        say({ type: "job_completed", ...record(jobId, 2, { status: "completed", message: "x".repeat(200) }) });
        say({ type: "job_deleted", jobId });
        say({ type: "notification", event: "news", data: "x".repeat(200), metadata: {}, timestamp: "2026-01-31T12:00:00Z" });
        if (number % 1000 === 0) one.watch(`one-${offset}`, () => {}).close();
      }
      await new Promise(setImmediate);
      made[0].sent.length = 0;
      gc();
      return process.memoryUsage().heapUsed;
    }
    const before = await live(2000);
    const after = await live(16_000);
    assert.equal(heard, 4 * 18_000);
    assert.ok(after - before < 2_000_000, `${after - before} bytes more`);
  });
});
