// The four ways to the server. Each is a function of
//   to       {http, store, heard(), vouch(live), expect(ms), live(), fail(error), complain(error)}
// and gives {stop(), changed(), renewed(), probe()}:
//   vouch    the server says, or not, that it is cut off from its store
//   expect   how long silence may last, half as long as it takes to be given up
//   changed  what is watched is another now
//   renewed  there is a newer token
//   probe    find out soon whether this is still alive
// `live` is called as soon as all that is watched is known and comes by itself. `fail` stops it; only the first counts.

import { StatusError } from "./http.js";

const LONG_POLL_S = 25; // below what proxies put up with
const FIRST_LONG_POLL_S = 1; // to see soon whether it is let through
const POLL_MS = 2000;
const SLACK_MS = 8000;
// A browser has six connections to a server (HTTP/1.1); some must be left for other requests.
const MAX_WAITING = 4;
const IDS_IN_MESSAGE = 1000;
const REFUSED = { status: 401, token: true };

const scope = (kind, names) =>
  kind === "job" ? { jobIds: names }
  : kind === "user" ? { userId: names[0] }
  : kind === "channel" ? { types: "notification", channels: names.filter(Boolean) }
  : {};

const keysOf = (kind, names) => names.map((name) => `${kind}:${name}`);

export function openSocket(to) {
  const { http, store } = to;
  const asked = new Map(); // ref -> what the answer to a `subscribe` will be, as `apply` takes it
  let held = new Set(); // topics that were asked for here
  let greeted;
  let socket;
  let over;
  let ref = 0;

  const send = (message) => socket?.readyState === 1 && socket.send(JSON.stringify(message));

  function ask(kind, names, cursor) {
    while (names.length) {
      const some = names.splice(0, IDS_IN_MESSAGE);
      asked.set(++ref, { type: "snapshot", keys: keysOf(kind, some), reset: cursor !== undefined, jobs: [] });
      send({ type: "subscribe", ref, ...scope(kind, some), last_seen: cursor });
    }
  }

  function changed() {
    if (!greeted) return;
    const feeds = store.feeds();
    const wanted = new Set(feeds.flatMap(({ kind, names }) => keysOf(kind, names)));
    const left = [...held].filter((key) => !wanted.has(key));
    if (left.every((key) => key.startsWith("job:"))) {
      if (left.length) send({ type: "unsubscribe", jobIds: left.map((key) => key.slice(4)) });
    } else {
      // These may overlap with others: everything, and what is left again from the cursor.
      send({ type: "unsubscribe" });
      held.clear();
    }
    for (const { kind, names, fresh, cursor } of feeds) {
      const added = names.filter((name) => !held.has(`${kind}:${name}`));
      ask(kind, added.filter((name) => !fresh.includes(name)), cursor);
      ask(kind, added.filter((name) => fresh.includes(name)));
    }
    held = wanted;
    settle();
  }

  function settle(cursor) {
    if (asked.size) return;
    store.apply(undefined, {}, cursor);
    to.live();
  }

  function receive(message) {
    const { type, id } = message;
    const answered = asked.get(message.ref);
    answered?.jobs.push(...(message.snapshot ?? []));
    if (message.more) return;
    if (/^[ch]/.test(type)) to.vouch(message.live);
    if (type === "connected") {
      greeted = true;
      to.expect(message.heartbeat * 1000);
      changed();
    } else if (type === "subscribed") {
      asked.delete(message.ref);
      if (message.denied[0]) to.complain(new StatusError("denied", String(message.denied)));
      if (!message.recovered) store.apply(undefined, answered);
      settle(id);
    } else if (type === "reset") {
      // The log began anew. The answers to the same questions say so of each topic.
      held.clear();
      changed();
    } else if (type === "error") {
      const error = new StatusError(message.code, message.message);
      // What is not allowed is left alone, all else is tried again.
      if (answered && !/forbidden|invalid/.test(error.code)) return to.fail(error);
      to.complain(error);
      if (asked.delete(message.ref)) settle();
    } else {
      // While answers are due the cursor would leave out what they will bring.
      store.apply(undefined, message, greeted && !asked.size ? id : undefined);
    }
  }

  function stop() {
    over = true;
    socket?.close();
  }

  async function begin() {
    const token = await http.bearer();
    if (over) return;
    const url = http.locate("ws/jobs");
    url.protocol = url.protocol.replace("http", "ws");
    socket = new WebSocket(url, ["statuswire.v1.lines", "statuswire.v1"]);
    // In a message and not in the address: addresses end up in the logs of proxies.
    socket.onopen = () => token && send({ type: "auth", token });
    socket.onmessage = ({ data }) => {
      if (over) return;
      to.heard();
      try {
        for (const line of data.split("\n")) receive(JSON.parse(line));
      } catch {
        // Whatever speaks there, it is not the server, or no longer.
        to.fail();
      }
    };
    socket.onclose = ({ code, reason }) => {
      // The server also says 1008 to those whom it took for dead.
      const final = code === 1008 && !/ping/.test(reason);
      const delay = code === 1001 ? +/\d+/.exec(reason)?.[0] || 0 : undefined;
      const refused = code === 4401 && REFUSED;
      to.fail(new StatusError(refused ? "unauthorized" : "closed", reason, { final, delay, ...refused }));
    };
  }
  begin().catch(to.fail);

  return {
    stop,
    changed,
    renewed: async () => send({ type: "auth", token: await http.bearer() }),
    probe: () => send({ type: "ping" }),
  };
}

/** A link of one loop per feed: `step(feed, signal, settle)` is repeated until it throws. */
function openLoops(to, step) {
  const loops = new Map(); // feed -> {controller, names, live}

  function run({ key, names }) {
    const controller = new AbortController();
    const { signal } = controller;
    const loop = { controller, names: String(names) };
    const settle = () => {
      loop.live = true;
      if ([...loops.values()].every((one) => one.live)) to.live();
    };
    loops.set(key, loop);
    (async () => {
      let feed;
      while (!signal.aborted && (feed = to.store.feeds().find((one) => one.key === key))) {
        // What is new in it is caught up with the others, whose cursor stays.
        if (feed.fresh[0] && feed.cursor) await poll(to, { ...feed, key: feed.kind, names: feed.fresh, cursor: undefined }, signal);
        await step(feed, signal, settle);
      }
    })().catch((error) => {
      if (signal.aborted) return;
      if (!error.final || !error.status) return to.fail(error);
      // Not allowed: that is no reason to give up the others.
      to.complain(error);
      settle();
    });
  }

  function changed() {
    const feeds = to.store.feeds();
    for (const [key, { controller, names }] of loops) {
      if (!feeds.some((feed) => feed.key === key && String(feed.names) === names)) {
        controller.abort();
        loops.delete(key);
      }
    }
    for (const feed of feeds) if (!loops.has(feed.key)) run(feed);
  }

  function stop() {
    for (const [, { controller }] of loops) controller.abort();
    loops.clear();
  }

  function again() {
    stop();
    changed();
  }

  queueMicrotask(() => {
    changed();
    // With nothing to watch, whether the server answers is all there is to know.
    if (!loops.size) to.http.json("api/v2/jobs?limit=1").then(to.live, to.fail);
  });
  return { stop, changed, renewed: again, probe: again };
}

/** One poll: what is new of a feed, or at once all of it. */
async function poll(to, { key, kind, names, cursor }, signal, wait = LONG_POLL_S) {
  const timeout = cursor ? wait : 0;
  const query = { ...scope(kind, names), timeout, last_seen: cursor };
  const patience = AbortSignal.timeout(timeout * 1000 + SLACK_MS);
  const { updates, last_seen, reset, live } = await to.http.json("api/v2/jobs/poll", { query, signal: AbortSignal.any([signal, patience]) });
  signal.throwIfAborted();
  to.heard();
  to.vouch(live);
  if (reset || cursor === undefined) {
    to.store.apply(key, { type: "snapshot", jobs: updates.filter((one) => one.version), keys: keysOf(kind, names), reset });
  }
  for (const update of updates) to.store.apply(key, update);
  to.store.apply(key, {}, last_seen);
}

function checkRoom(to) {
  if (to.store.feeds().length > MAX_WAITING) throw new StatusError("blocked", "too much to watch");
}

export const openPolls = (to) =>
  openLoops(to, async (feed, signal, settle) => {
    to.expect(SLACK_MS);
    await poll(to, feed, signal, 0);
    settle();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS * (0.75 + Math.random() / 2)));
  });

export function openLongPolls(to) {
  let wait = FIRST_LONG_POLL_S;
  return openLoops(to, async (feed, signal, settle) => {
    to.expect(LONG_POLL_S * 1000);
    checkRoom(to);
    await poll(to, feed, signal, wait);
    if (!feed.cursor) return;
    settle();
    wait = LONG_POLL_S;
  });
}

export function openStreams(to) {
  let delay; // milliseconds, as the server wants it
  return openLoops(to, async (feed, signal, settle) => {
    const { key, kind, names, cursor } = feed;
    checkRoom(to);
    const wait = () => poll(to, { ...feed, cursor: id }, signal);
    let id = cursor;
    // Streams of jobs carry no notifications; polls do, with the same cursor.
    if (kind === "channel") {
      await poll(to, feed, signal);
      return settle();
    }
    const answer = await to.http.fetch("api/v2/jobs/stream", { query: { ...scope(kind, names), last_seen: cursor }, accept: "text/event-stream", signal });
    to.heard();
    if (answer.status === 204) {
      settle();
      return wait();
    }
    const whole = { type: "snapshot", jobs: [], keys: keysOf(kind, names) };
    let failure;

    function take(message) {
      const { type, code } = message;
      if (/^[ch]/.test(type)) to.vouch(message.live);
      if (type === "connected") {
        to.expect(message.heartbeat * 1000);
        if (cursor !== undefined) settle();
      } else if (type === "reset") {
        whole.reset = true;
      } else if (type === "snapshot") {
        whole.jobs.push(...message.jobs);
        if (message.more) return;
        to.store.apply(key, whole, id);
        whole.jobs = [];
        settle();
      } else if (type === "error") {
        failure = new StatusError(code, message.message, { delay, final: code === "disconnected", ...(code === "token_expired" && REFUSED) });
      } else to.store.apply(key, { ...message, id }, id);
    }

    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read().catch(() => {
        throw new StatusError("closed", undefined, { delay });
      });
      signal.throwIfAborted();
      if (done) break;
      to.heard();
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const [, field, text] = /^(\w*): ?([^]*)/.exec(line) ?? [];
        // The server's events have one line of data, behind their id.
        if (field === "data") take(JSON.parse(text));
        else if (field === "id") id = text;
        else if (field === "retry") delay = +text;
      }
    }
    if (failure || kind !== "job") throw failure ?? new StatusError("closed", undefined, { delay });
    // All of its jobs have ended. What begins again is not missed.
    await wait();
  });
}
