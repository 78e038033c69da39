// The four ways to the server. Each is a function of
//   to       {http, store: {apply, feeds}, heard(), live(heartbeatMs), fail(error), complain(error)}
// and gives {stop(), changed(), renewed(), probe()}:
//   changed  what is watched is another now
//   renewed  there is a newer token
//   probe    find out soon whether this is still alive
// `live` is called as soon as all that is watched is known and comes by itself, `fail` at most once.

import { StatusError } from "./http.js";

const LONG_POLL_S = 25; // below what proxies put up with
const FIRST_LONG_POLL_S = 1; // to see soon whether it is let through
const POLL_MS = 2000;
const SLACK_MS = 8000;
// A browser has six connections to a server (HTTP/1.1); some must be left for other requests.
const MAX_WAITING = 4;
const IDS_IN_MESSAGE = 1000;

const digits = (text) => (/\d+/.test(text) ? Number(/\d+/.exec(text)[0]) : undefined);

export function openSocket(to) {
  const { http, store } = to;
  const held = new Map(); // topics that were asked for here: key -> {kind, name}
  const asked = new Map(); // ref -> {feed, names, reset, jobs}
  let socket;
  let token;
  let user; // undefined until we are greeted
  let ref = 0;
  let over = false;

  const send = (message) => socket?.readyState === 1 && socket.send(JSON.stringify(message));

  function ask({ key, kind }, names, cursor, known) {
    const scope = {
      job: () => ({ jobIds: names }),
      user: () => ({ userId: names[0] }),
      channel: () => ({ channels: names.filter(Boolean) }),
      all: () => ({}),
    }[kind]();
    ref += 1;
    asked.set(ref, { feed: key, names: kind === "job" ? names : undefined, reset: known, jobs: [] });
    send({ type: "subscribe", ref, ...scope, last_seen: cursor });
  }

  function changed() {
    if (user === undefined) return;
    const left = new Map(held);
    held.clear();
    for (const feed of store.feeds()) {
      const [known, fresh] = [[], []];
      for (const name of feed.names) {
        const key = `${feed.kind}:${name}`;
        held.set(key, { kind: feed.kind, name });
        if (!left.delete(key)) (feed.fresh.includes(name) ? fresh : known).push(name);
      }
      for (let at = 0; at < known.length; at += IDS_IN_MESSAGE) ask(feed, known.slice(at, at + IDS_IN_MESSAGE), feed.cursor, true);
      for (let at = 0; at < fresh.length; at += IDS_IN_MESSAGE) ask(feed, fresh.slice(at, at + IDS_IN_MESSAGE));
    }
    const gone = { job: [], user: [], channel: [], all: [] };
    for (const { kind, name } of left.values()) gone[kind].push(name);
    if (gone.job.length) send({ type: "unsubscribe", jobIds: gone.job });
    if (gone.channel.some(Boolean)) send({ type: "unsubscribe", channels: gone.channel.filter(Boolean) });
    // Watching everything is, for whoever is no admin, the same as watching oneself.
    if (gone.all.length) send({ type: "unsubscribe", all: true, userId: held.has(`user:${user}`) ? undefined : user });
    for (const userId of gone.user) if (userId !== user || !held.has("all:")) send({ type: "unsubscribe", userId });
    settle();
  }

  const settle = (id) => {
    if (asked.size) return;
    // Not before all is answered: until then the cursor would leave out what the others are still owed.
    if (id) store.apply(undefined, { id });
    to.live();
  };

  function receive(message) {
    const { type, id } = message;
    if (type === "connected") {
      user = message.userId;
      to.heartbeat(message.heartbeat * 1000);
      changed();
    } else if (type === "subscribed" || type === "reset") {
      const question = asked.get(message.ref) ?? (all ??= { jobs: [], reset: true });
      question.jobs.push(...(message.snapshot ?? []));
      if (message.more) return;
      all = undefined;
      asked.delete(message.ref);
      if (message.denied?.length) to.complain(new StatusError("denied", `not to be watched: ${message.denied.join(", ")}`));
      if (!message.recovered) store.apply(question.feed, { ...question, type: "snapshot" });
      settle(id);
    } else if (type === "error") {
      const question = asked.get(message.ref);
      const error = new StatusError(message.code, message.message);
      if (question && /forbidden|invalid/.test(message.code)) {
        asked.delete(message.ref);
        settle();
      } else if (question) return end(error);
      to.complain(error);
    } else if (type !== "pong" && type !== "authenticated" && type !== "unsubscribed") {
      store.apply(undefined, { ...message, at: asked.size || user === undefined ? undefined : id });
    }
  }
  let all; // what a `reset` brings, while it comes

  function end(error) {
    if (over) return;
    stop();
    to.fail(error);
  }

  function stop() {
    over = true;
    socket?.close();
  }

  (async () => {
    try {
      token = await http.bearer();
    } catch (error) {
      return end(error);
    }
    if (over) return;
    if (!globalThis.WebSocket) return end(new StatusError("blocked", "there are no WebSockets here"));
    const url = http.url("ws/jobs");
    url.protocol = url.protocol.replace("http", "ws");
    socket = new WebSocket(url, ["statuswire.v1"]);
    // In a message and not in the address: addresses end up in the logs of proxies.
    socket.onopen = () => token && send({ type: "auth", token });
    socket.onmessage = ({ data }) => {
      if (over) return;
      to.heard();
      receive(JSON.parse(data));
    };
    socket.onclose = ({ code, reason }) => {
      if (code === 4401) return end(new StatusError("unauthorized", reason, { status: 401, token }));
      // The server also says 1008 to those whom it took for dead.
      const final = code === 1008 && !reason.includes("ping");
      end(new StatusError(final ? "disconnected" : "closed", reason || "the connection was closed", { final, delay: code === 1001 ? digits(reason) : code === 4429 ? 5000 : undefined }));
    };
  })().catch(end);

  return {
    stop,
    changed,
    renewed: async () => send({ type: "auth", token: (token = await http.bearer()) }),
    probe: () => send({ type: "ping" }),
  };
}

/** A link that runs one loop per feed, made of `step(feed, signal, firstTime)`, which is repeated until it throws. */
function openLoops(to, step) {
  const loops = new Map(); // feed -> {stop, names, live}
  let over = false;

  function run(feed) {
    const controller = new AbortController();
    const loop = { names: String(feed.names), stop: () => controller.abort(), live: false };
    const settle = () => {
      loop.live = true;
      if ([...loops.values()].every((one) => one.live)) to.live();
    };
    (async () => {
      try {
        for (let first = true; !controller.signal.aborted; first = false) {
          const present = to.store.feeds().find((one) => one.key === feed.key);
          if (!present) return;
          await step(present, controller.signal, settle, first);
        }
      } catch (error) {
        if (controller.signal.aborted || over) return;
        // Not allowed, or not possible: that is no reason to give up the others.
        if (error.final && error.status) {
          to.complain(error);
          settle();
        } else end(error);
      }
    })();
    return loop;
  }

  function changed() {
    const feeds = to.store.feeds();
    for (const [key, loop] of loops) {
      if (!feeds.some((feed) => feed.key === key && String(feed.names) === loop.names)) {
        loop.stop();
        loops.delete(key);
      }
    }
    for (const feed of feeds) if (!loops.has(feed.key)) loops.set(feed.key, run(feed));
  }

  function again() {
    for (const loop of loops.values()) loop.stop();
    loops.clear();
    changed();
  }

  function stop() {
    over = true;
    for (const loop of loops.values()) loop.stop();
  }

  function end(error) {
    if (over) return;
    stop();
    to.fail(error);
  }

  queueMicrotask(() => {
    if (over) return;
    changed();
    // With nothing to watch, whether the server answers is all there is to know.
    if (!loops.size) poll(to, { key: "", kind: "job", names: ["-"], fresh: [] }, 0, new AbortController().signal).then(to.live, end);
  });
  return { stop, changed, renewed: again, probe: again };
}

const scope = ({ kind, names }) => ({
  job: { jobIds: String(names) },
  user: { userId: names[0] },
  channel: { types: "notification", channels: String(names.filter(Boolean)) },
  all: {},
})[kind];

/** One poll: what is new of a feed, or with `fresh` what there is of these. */
async function poll(to, feed, timeout, signal, fresh) {
  const expired = new AbortController();
  const timer = setTimeout(() => expired.abort(), timeout * 1000 + SLACK_MS);
  const stop = () => expired.abort();
  signal.addEventListener("abort", stop);
  try {
    const query = { ...scope(fresh ? { ...feed, names: fresh } : feed), timeout, last_seen: fresh ? undefined : feed.cursor };
    const answer = await to.http.json("api/v2/jobs/poll", { query, signal: expired.signal });
    if (signal.aborted) throw new StatusError("aborted", "");
    to.heard();
    const { updates, last_seen: id, reset } = answer;
    const isState = fresh || feed.cursor === undefined || reset;
    const names = feed.kind === "job" ? (fresh ?? feed.names) : undefined;
    if (isState) {
      const jobs = updates.filter((update) => update.version);
      to.store.apply(feed.key, { type: "snapshot", jobs, names, reset: reset && feed.cursor !== undefined });
    }
    for (const update of updates) if (!isState || !update.version) to.store.apply(feed.key, { ...update, at: undefined });
    if (!fresh) to.store.apply(feed.key, { id });
  } catch (error) {
    throw expired.signal.aborted && !signal.aborted ? new StatusError("timeout", "the server does not answer") : error;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
  }
}

/** The state of what is new in a feed that has a cursor already. */
const catchUp = (to, feed, signal) =>
  feed.cursor !== undefined && feed.fresh.length ? poll(to, feed, 0, signal, feed.fresh) : undefined;

const pause = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });

function checkRoom(to) {
  if (to.store.feeds().length > MAX_WAITING) throw new StatusError("blocked", "too much is watched for this transport");
}

export function openPolls(to) {
  return openLoops(to, async (feed, signal, settle) => {
    await catchUp(to, feed, signal);
    await poll(to, feed, 0, signal);
    settle();
    to.heartbeat(POLL_MS + SLACK_MS);
    await pause(POLL_MS * (0.75 + Math.random() / 2), signal);
  });
}

export function openLongPolls(to) {
  let wait = FIRST_LONG_POLL_S;
  return openLoops(to, async (feed, signal, settle, first) => {
    checkRoom(to);
    await catchUp(to, feed, signal);
    to.heartbeat((wait * 1000 + SLACK_MS) / 2);
    await poll(to, feed, first && feed.cursor === undefined ? 0 : wait, signal);
    if (first && feed.cursor === undefined) return;
    settle();
    wait = LONG_POLL_S;
  });
}

export function openStreams(to) {
  let retry; // milliseconds, as the server wants it
  return openLoops(to, async (feed, signal, settle) => {
    checkRoom(to);
    // Streams of jobs carry no notifications; polls do, with the same cursor.
    if (feed.kind === "channel") {
      await poll(to, feed, feed.cursor === undefined ? 0 : LONG_POLL_S, signal);
      return settle();
    }
    await catchUp(to, feed, signal);
    const token = await to.http.bearer();
    const query = { ...scope(feed), last_seen: feed.cursor };
    const answer = await to.http.request("api/v2/jobs/stream", { query, accept: "text/event-stream", signal });
    to.heard();
    if (answer.status === 204) {
      settle();
      return poll(to, feed, LONG_POLL_S, signal);
    }
    if (!/event-stream/.test(answer.headers.get("content-type"))) throw new StatusError("blocked", "something else than an event stream came");
    const reset = { jobs: [], names: feed.kind === "job" ? feed.names : undefined, reset: false };
    let failure;
    let id;

    function take(message) {
      const { type } = message;
      if (type === "connected") {
        to.heartbeat(message.heartbeat * 1000);
        if (feed.cursor !== undefined) settle();
      } else if (type === "reset") {
        reset.reset = true;
        reset.jobs = [];
      } else if (type === "snapshot") {
        reset.jobs.push(...message.jobs);
        if (message.more) return;
        to.store.apply(feed.key, { ...reset, type, id });
        reset.jobs = [];
        settle();
      } else if (type === "error") {
        const { code } = message;
        failure = new StatusError(code, message.message, code === "token_expired" ? { status: 401, token } : { final: code === "disconnected", delay: retry });
      } else to.store.apply(feed.key, { ...message, id });
    }

    const reader = answer.body.getReader();
    const decoder = new TextDecoder();
    let rest = "";
    let data = "";
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done || signal.aborted) break;
        to.heard();
        const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
        rest = lines.pop();
        for (const line of lines) {
          const [, field, text] = /^(\w*):? ?(.*)$/.exec(line) ?? [];
          if (field === "data") data += text;
          else if (field === "id") id = text;
          else if (field === "retry") retry = Number(text);
          else if (line === "" && data) {
            const message = JSON.parse(data);
            data = "";
            take(message);
          }
        }
      }
    } catch (error) {
      if (!(error instanceof StatusError)) throw new StatusError("closed", "the connection was closed", { delay: retry });
      throw error;
    }
    if (failure) throw failure;
    if (signal.aborted) return;
    if (feed.kind !== "job") throw new StatusError("closed", "the stream has ended", { delay: retry });
    // All jobs have ended. What begins again is not missed.
    await poll(to, { ...feed, cursor: id }, LONG_POLL_S, signal);
  });
}
