// The client in Node, against the server at STATUSWIRE_URL. Run by test_node.py.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { after, describe, test } from "node:test";

import { client as anyClient, until, within } from "./node_tools.mjs";

const url = process.env.STATUSWIRE_URL;
const transports = globalThis.WebSocket ? ["websocket", "sse", "longpoll", "poll"] : ["sse", "longpoll", "poll"];
let number = 0;

// The fetch of Node 18, which Debian 12 has, at times leaves a stream open that was aborted, and the process would stay.
if (Number.parseInt(process.versions.node) < 20) after(() => setTimeout(() => process.exit(), 1000).unref());

async function say(method, path, body) {
  const headers = { "content-type": "application/json" };
  const answer = await fetch(url + path, { method, headers, body: body && JSON.stringify(body) });
  assert.ok(answer.ok, `${method} ${path}: ${answer.status}`);
  return answer.status === 204 ? null : answer.json();
}

const publish = (jobId, fields) => say("POST", `/api/v2/jobs/${jobId}/updates`, { userId: "anonymous", ...fields });
const newId = (name) => `${name}-${(number += 1)}`;
const client = (t, options) => anyClient(t, { url, ...options });

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
      await until(() => made.live);
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
      await until(() => made.live);
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
    assert.match(String(errors), /^invalid_(field|parameter)$/);
    assert.equal(made.live, true);
  });
});
