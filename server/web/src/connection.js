// Keeps one link alive: which transport, when to try again, and what to say of it meanwhile.

import { openLongPolls, openPolls, openSocket, openStreams } from "./links.js";
import { StatusError, asError } from "./http.js";

const OPENERS = { websocket: openSocket, sse: openStreams, longpoll: openLongPolls, poll: openPolls };

const CAP_MS = 20_000;
const LONGEST_MS = 3_600_000; // to stay away, whatever is said
const CONNECT_MS = 6000; // without a word, before it is live
const STABLE_MS = 3000;
const PROBE_MS = 3000;
const TICK_MS = 1000;
const HEARTBEAT_MS = 30_000; // until the server says otherwise
const HIDDEN_MS = 30_000;
// When to look whether a better transport works by now: soon, and ever less often.
const SOON_MS = 5000;
const SELDOM_MS = 300_000;

// Pages that may keep nothing get an exception for asking.
function session(use) {
  try {
    return use(sessionStorage);
  } catch {
    // Then it is not remembered.
  }
}

export function createConnection({ http, store, options, onState, complain }) {
  const { transports = Object.keys(OPENERS), autoReconnect = true, maxReconnectAttempts = Infinity, reconnectDelay = 500 } = options;
  const memory = `statuswire:${http.locate("")}`;
  let state;
  let link; // {index, live, silence, heardAt, liveAt, doubtful, alone, end, fail, changed, renewed, probe}
  let trial; // another one, of a better transport
  let wanted; // between start and stop
  let asleep; // the page is
  let failures; // for the length of the wait
  let attempts; // since it was live
  let start; // where a round over the transports begins
  let tried; // in this round
  let refused; // the last token was
  let timer;
  let due; // before that the server does not want us
  let upward;
  let upwardMs;
  let renewal;
  let hidden;
  let tick;
  let tickedAt;
  let listening;

  function say(now, error) {
    const transport = link?.live ? transports[link.index] : null;
    if (state !== (state = now + transport + error)) onState({ state: now, transport, error });
  }

  function sayLive() {
    if (link.alone) say("connecting", new StatusError("store_unavailable"));
    else say(/poll/.test(transports[link.index]) ? "polling" : "open");
  }

  // ---- one link

  function open(index, isTrial) {
    const one = { index, silence: HEARTBEAT_MS, heardAt: Date.now() };
    let over;
    if (isTrial) trial = one;
    else link = one;
    one.end = () => {
      over = true;
      one.stop?.();
    };
    one.fail = (why) => {
      if (over) return;
      one.end();
      if (link === one) return lost(one, asError(why));
      trial = undefined;
      if (index + 1 < link?.index) open(index + 1, true);
      else lookUpward();
    };
    Object.assign(one, OPENERS[transports[index]]({
      http,
      store,
      complain,
      heard() {
        one.heardAt = Date.now();
        if (one.doubtful) sayLive((one.doubtful = undefined));
      },
      vouch(live) {
        if (one.alone !== (one.alone = live === false) && link === one && one.live) sayLive(lookUpward());
      },
      expect: (ms) => (one.silence = ms || HEARTBEAT_MS),
      live: () => over || one.live || nowLive(one),
      fail: one.fail,
    }));
  }

  function nowLive(one) {
    const { index } = one;
    one.live = true;
    one.liveAt = one.heardAt = Date.now();
    if (trial === one) {
      // No better than the one there is.
      if (one.alone) return one.fail();
      trial = undefined;
      link.end();
      link = one;
    }
    refused = false;
    attempts = tried = 0;
    start = index;
    session((kept) => (kept[memory] = transports[index]));
    upwardMs = SOON_MS;
    lookUpward();
    watchToken();
    sayLive();
  }

  function lookUpward() {
    clearTimeout(upward);
    // Another server may have what this one is cut off from.
    if (!link?.live || !(link.index || link.alone)) return;
    upward = setTimeout(() => open(0, true), upwardMs * (0.75 + Math.random() / 2));
    upwardMs = Math.min(SELDOM_MS, 2 * upwardMs);
  }

  function watchToken() {
    const ms = http.renewIn();
    clearTimeout(renewal);
    // Longer than that a timer cannot wait. If there is no new one, there is time for another try.
    if (wanted && ms < 2 ** 31) renewal = setTimeout(() => http.bearer().then(() => link?.renewed()).catch(complain).then(watchToken), ms > 0 ? ms + 1 : SOON_MS);
  }

  // ---- losing it

  function lost(one, why) {
    drop();
    if (why.token && options.getToken && !refused) {
      refused = http.refuse();
      say("connecting", why);
      return go();
    }
    if (why.status === 401 || why.final) return close(why);
    if (one.live) {
      if (Date.now() - one.liveAt > STABLE_MS) failures = 0;
      say("connecting", why);
    } else {
      // What is in the way of one transport may let another one through. Who says when to come back is the server itself.
      if (++tried < transports.length && why.delay === undefined) return go();
      tried = 0;
      say("offline", why);
      complain(why);
    }
    if (!autoReconnect) return close(why);
    if (++attempts > maxReconnectAttempts) return close(new StatusError("gave_up", why.message, { cause: why }));
    due = performance.now() + Math.min(why.delay ?? 0, LONGEST_MS);
    goIn(Math.random() * Math.min(CAP_MS, reconnectDelay * 2 ** failures));
    // A short life makes it no more patient than a few failures do, and lets none be forgotten.
    failures += !one.live || failures < 2;
  }

  function goIn(ms) {
    clearTimeout(timer);
    timer = setTimeout(go, Math.max(ms, due - performance.now()));
  }

  function go() {
    if (wanted && !asleep && !link) open((start + tried) % transports.length);
  }

  function drop() {
    clearTimeout(timer);
    clearTimeout(renewal);
    clearTimeout(upward);
    trial?.end();
    link?.end();
    link = trial = undefined;
  }

  function close(why) {
    wanted = false;
    drop();
    clearTimeout(hidden);
    clearInterval(tick);
    listening?.abort();
    say("closed", why);
    if (why) complain(why);
  }

  // ---- what happens around us

  /** Look whether the links are alive: timers and sockets may have slept. */
  function check(quick) {
    const now = Date.now();
    quick ||= now - tickedAt > TICK_MS + SOON_MS;
    tickedAt = now;
    for (const one of [link, trial]) {
      if (!one) continue;
      // A clock that was set back makes it negative.
      const silent = Math.abs(now - one.heardAt);
      if (silent > (one.live ? 2 * one.silence : CONNECT_MS) || now - one.doubtful > PROBE_MS) one.fail(new StatusError("timeout"));
      else if (quick && one.live) {
        one.doubtful = now;
        // More than a heartbeat is missing: until something comes, nobody knows.
        if (silent > 1.2 * one.silence) say("connecting");
        one.probe();
      }
    }
  }

  function wake() {
    clearTimeout(hidden);
    asleep = false;
    if (link) check(true);
    else goIn(0);
  }

  function sleep(why) {
    asleep = true;
    drop();
    say(why);
  }

  const handlers = {
    online: wake,
    offline() {
      drop();
      say("offline", new StatusError("offline"));
      // What browsers say of it is not always so.
      goIn(CAP_MS);
    },
    visibilitychange() {
      if (!document.hidden) wake();
      else if (options.visibility === "pause") hidden = setTimeout(sleep, HIDDEN_MS, "offline");
    },
    // An open connection would keep the page out of the back-forward cache.
    pagehide: () => sleep("connecting"),
    pageshow: wake,
    freeze: () => sleep("connecting"),
    resume: wake,
  };

  return {
    start() {
      if (wanted) return;
      wanted = true;
      asleep = refused = false;
      failures = attempts = tried = due = 0;
      start = Math.max(0, transports.indexOf(session((kept) => kept[memory])));
      tickedAt = Date.now();
      tick = setInterval(check, TICK_MS);
      listening = new AbortController();
      // Those of the document come by here, too.
      listening.capture = true;
      for (const event in handlers) globalThis.addEventListener?.(event, handlers[event], listening);
      say("connecting");
      go();
    },

    stop: () => close(),

    changed() {
      link?.changed?.();
      trial?.changed?.();
    },
  };
}
