// Keeps one link alive: which transport, when to try again, and what to say of it meanwhile.

import { openLongPolls, openPolls, openSocket, openStreams } from "./links.js";
import { StatusError } from "./http.js";

const OPENERS = { websocket: openSocket, sse: openStreams, longpoll: openLongPolls, poll: openPolls };
export const TRANSPORTS = Object.keys(OPENERS);

const CAP_MS = 20_000;
const CONNECT_MS = 6000; // without a word, before it is live
const STABLE_MS = 3000;
const PROBE_MS = 3000;
const TICK_MS = 1000;
const HEARTBEAT_MS = 30_000; // until the server says otherwise
const HIDDEN_MS = 30_000;
// When to look whether a better transport works by now; the first is for one that has worked before.
const UPWARD_MS = [5000, 15_000, 300_000];

const storage = () => {
  try {
    return globalThis.sessionStorage;
  } catch {
    // Browsers that keep nothing throw.
  }
};

export function createConnection({ http, store, options, onState, complain }) {
  const { transports = TRANSPORTS, autoReconnect = true, maxReconnectAttempts = Infinity, reconnectDelay = 500 } = options;
  const { visibility = "keep" } = options;
  const memory = `statuswire:${http.url("")}`;
  const remembered = () => Math.max(0, transports.indexOf(storage()?.getItem(memory)));
  const worked = new Set();
  let state = "connecting";
  let error;
  let link; // {name, index, live, heartbeat, heardAt, liveAt, stop, changed, renewed, probe}
  let trial;
  let wanted = false;
  let paused = false;
  let failures = 0;
  let attempts = 0;
  let start = 0; // where a round over the transports begins
  let tried = 0; // in this round
  let refused = false;
  let timer;
  let upward;
  let upwardMs;
  let renewal;
  let hidden;
  let tick;
  let tickedAt;

  function say(now, why) {
    error = why;
    if (state === now) return;
    state = now;
    onState();
  }

  // ---- one link

  function open(index, isTrial) {
    const name = transports[index];
    const one = { name, index, live: false, heartbeat: HEARTBEAT_MS, heardAt: Date.now() };
    if (isTrial) trial = one;
    else link = one;
    let over = false;
    const guard = (what) => (value) => over || what(value);
    one.end = () => {
      over = true;
      one.stop?.();
    };
    one.fail = guard((why) => {
      one.end();
      if (trial === one) {
        trial = undefined;
        if (index + 1 < link?.index) open(index + 1, true);
        else lookUpward();
      } else if (link === one) lost(one, why);
    });
    Object.assign(one, OPENERS[name]({
      http,
      store,
      complain,
      heard: () => (one.heardAt = Date.now()),
      heartbeat: (ms) => (one.heartbeat = ms),
      fail: one.fail,
      live: guard(() => one.live || nowLive(one)),
    }));
    if (over) one.stop();
  }

  function nowLive(one) {
    one.live = true;
    one.liveAt = one.heardAt = Date.now();
    if (trial === one) {
      trial = undefined;
      link.end();
      link = one;
    }
    refused = false;
    attempts = tried = 0;
    start = one.index;
    worked.add(one.name);
    storage()?.setItem(memory, one.name);
    clearTimeout(upward);
    upwardMs = undefined;
    lookUpward();
    watchToken();
    say(one.name === "websocket" || one.name === "sse" ? "open" : "polling");
  }

  function lookUpward() {
    clearTimeout(upward);
    if (!link?.live || !link.index) return;
    const [soon, first, most] = UPWARD_MS;
    const ms = (upwardMs ??= worked.has(transports[0]) ? soon : first);
    upwardMs = Math.min(most, ms * 2);
    upward = setTimeout(() => link?.live && !trial && open(0, true), ms * (0.75 + Math.random() / 2));
  }

  function watchToken() {
    clearTimeout(renewal);
    const ms = http.renewIn();
    if (ms < 2 ** 31) renewal = setTimeout(renew, Math.max(0, ms));
  }

  async function renew() {
    try {
      await http.bearer();
      await link?.renewed();
    } catch (why) {
      complain(why);
    }
    if (wanted) watchToken();
  }

  // ---- losing it

  function lost(one, why) {
    link = undefined;
    dropTrial();
    if (why.status === 401) {
      if (refused || !why.token) return close(new StatusError("unauthorized", why.message, why));
      refused = true;
      say("connecting", why);
      http.bearer(why.token).then(() => wanted && !link && !paused && open(one.index), (problem) => wanted && !link && lost(one, problem));
      return;
    }
    if (why.final) return close(why);
    if (one.live) {
      if (!autoReconnect) return close(why);
      failures = Date.now() - one.liveAt > STABLE_MS ? 0 : Math.min(failures + 1, 2);
      start = one.index;
      tried = 0;
      say("connecting", why);
    } else {
      tried += 1;
      // What is in the way of one transport may let another one through. Who says when to come back is the server itself.
      if (tried < transports.length && why.delay === undefined) return open((start + tried) % transports.length);
      tried = 0;
      failures += 1;
      start = remembered();
      say("offline", why);
    }
    attempts += 1;
    if (attempts > maxReconnectAttempts || !autoReconnect) return close(new StatusError("gave_up", `no connection: ${why.message}`, { cause: why }));
    if (why.code !== "closed") complain(why);
    wait(why.delay);
  }

  function wait(least = 0) {
    const ms = Math.random() * Math.min(CAP_MS, reconnectDelay * 2 ** failures);
    clearTimeout(timer);
    timer = setTimeout(go, Math.max(ms, least));
  }

  function go() {
    clearTimeout(timer);
    if (wanted && !paused && !link) open((start + tried) % transports.length);
  }

  function dropTrial() {
    trial?.end();
    trial = undefined;
    clearTimeout(upward);
  }

  function drop() {
    dropTrial();
    link?.end();
    link = undefined;
    clearTimeout(timer);
    clearTimeout(renewal);
  }

  function close(why) {
    wanted = false;
    drop();
    clearInterval(tick);
    listen("removeEventListener");
    say("closed", why);
    if (why) complain(why);
  }

  // ---- what happens around us

  /** Look whether the link is alive, now: timers and sockets may have slept. */
  function check(quick) {
    const now = Date.now();
    const slept = now - tickedAt > TICK_MS + 5000;
    tickedAt = now;
    for (const one of [link, trial]) {
      if (!one) continue;
      const silent = now - one.heardAt;
      if (silent > (one.live ? 2 * one.heartbeat : CONNECT_MS)) one.fail(new StatusError("timeout", "the server has gone silent"));
      else if (one.live && one === link && (quick || slept)) probe(one, silent);
    }
  }

  function probe(one, silent) {
    // A heartbeat is missing: until something comes, nobody knows.
    if (silent > one.heartbeat * 1.2) say("connecting");
    one.probe();
    setTimeout(() => {
      if (link !== one) return;
      if (Date.now() - one.heardAt > PROBE_MS) one.fail(new StatusError("timeout", "the server does not answer"));
      else say(one.name === "websocket" || one.name === "sse" ? "open" : "polling");
    }, PROBE_MS);
  }

  function wake() {
    clearTimeout(hidden);
    paused = false;
    if (!wanted) return;
    if (link) check(true);
    else go();
  }

  function sleep(why) {
    if (!wanted) return;
    paused = true;
    drop();
    say(why);
  }

  const handlers = {
    online: wake,
    offline() {
      if (!wanted) return;
      drop();
      say("offline", new StatusError("offline", "this device is offline"));
      // What browsers say of it is not always so.
      failures += 1;
      timer = setTimeout(go, CAP_MS);
    },
    visibilitychange() {
      if (!document.hidden) return wake();
      if (visibility === "pause") hidden = setTimeout(() => sleep("offline"), HIDDEN_MS);
    },
    // An open connection would keep the page out of the back-forward cache.
    pagehide: () => sleep("connecting"),
    pageshow: wake,
    freeze: () => sleep("connecting"),
    resume: wake,
  };

  function listen(how) {
    for (const [event, handler] of Object.entries(handlers)) {
      const target = /visib|freeze|resume/.test(event) ? globalThis.document : globalThis;
      target?.[how]?.(event, handler);
    }
  }

  return {
    state: () => state,
    transport: () => (link?.live ? link.name : null),
    error: () => error,
    heartbeat: () => link?.heartbeat ?? HEARTBEAT_MS,

    start() {
      if (wanted) return;
      wanted = true;
      paused = false;
      failures = attempts = tried = 0;
      refused = false;
      start = remembered();
      tickedAt = Date.now();
      tick = setInterval(check, TICK_MS);
      listen("addEventListener");
      say("connecting");
      go();
    },

    /** Now, and as if nothing had ever failed. */
    restart() {
      close();
      this.start();
    },

    stop: () => close(),

    changed() {
      link?.changed();
      trial?.changed();
    },
  };
}
