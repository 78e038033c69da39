import { claims } from "./http.js";

// One connection for all tabs. The tab that holds the lock leads: it alone is connected, watches for all, and passes on
// what it hears. All have what all watch, and the cursors, so whoever leads next goes on where the last one was.

const ASK_MS = 5000;

/** The same as the connection, for which it stands in. */
export function createShare({ http, store, connection, onState, complain, StatusError }) {
  const id = String(Math.random());
  const tabs = new Map(); // what other tabs watch, for the one that leads
  let name; // of the lock and the channel
  let bus;
  let queue; // aborts waiting for the lock
  let leads; // gives the lock back
  let heardAt;
  let askedAt;
  let told; // what was last said of our own topics
  let tick;
  let stopped; // an AbortController

  const extra = new Map(); // what is watched only because others do -> a function that ends it
  let now = { state: "connecting", transport: null }; // of the connection here

  const post = (message) => bus?.postMessage(message);

  /** What this tab itself watches. */
  const own = () => [...store.topics].filter(([key, { listeners }]) => listeners.size > extra.has(key)).map(([key]) => key);

  function want(topics) {
    for (const [key, end] of extra) {
      if (topics.includes(key)) continue;
      end();
      extra.delete(key);
    }
    for (const key of topics) if (!extra.has(key)) extra.set(key, store.listen(key, () => {}));
  }

  function tell() {
    const wanted = [...new Set([...own(), ...[...tabs.values()].flat()])];
    const { state, transport, error } = now;
    want(wanted);
    post({ state, transport, wanted, error: error && { ...error, message: error.message, cause: undefined } });
  }

  function changed(force) {
    const topics = own();
    if (leads) connection.changed();
    if (!force && told === String(topics)) return;
    told = String(topics);
    if (leads) tell();
    else post({ tab: id, topics, anew: force });
  }

  async function join(options) {
    // Whatever wakes a page does so twice at times: one that waits is enough.
    queue?.abort();
    const mine = (queue = new AbortController());
    const lead = () =>
      new Promise((resolve) => {
        leads = resolve;
        connection.start();
        post({ who: true });
        tell();
      });
    // It may be taken away, or not be waited for any longer.
    await navigator.locks.request(name, options ?? { signal: mine.signal }, lead).catch(() => {});
    if (mine.signal.aborted) return yieldLead();
    sleep();
    wake();
  }

  function yieldLead() {
    if (!leads) return;
    leads();
    leads = undefined;
    connection.stop();
  }

  function leave(state) {
    queue?.abort();
    yieldLead();
    onState({ state, transport: null });
  }

  function sleep() {
    leave("connecting");
  }

  function wake() {
    join();
    changed(true);
  }

  function hear({ data }) {
    const { tab, topics, feed, message } = data;
    if (!tab && !data.ask) heardAt = Date.now();
    // From whoever took over while this tab stood still, even before it knows.
    if (message) store.apply(feed, message, data.cursor);
    else if (leads) {
      if (data.ask) tell();
      if (!tab) return;
      // It holds that lock for as long as it lives.
      if (!tabs.has(tab)) navigator.locks.request(name + tab, () => tabs.delete(tab) && leads && tell());
      tabs.set(tab, topics);
      // It may know better than those here before, who have given up.
      if (data.anew) connection.start();
      tell();
      const keys = topics.filter((key) => store.topics.get(key)?.synced);
      // Over a WebSocket there is one cursor for all.
      const cursor = now.transport === "websocket" ? store.feeds()[0]?.cursor : undefined;
      post({ message: { type: "snapshot", keys, jobs: keys.flatMap(store.known) }, cursor });
    } else if (!tab && !data.ask) {
      if (data.who) changed(true);
      else {
        const { state, transport, wanted, error } = data;
        want(wanted);
        onState({ state, transport, error: error && new StatusError(error.code, error.message, error) });
      }
    }
  }

  // Who leads but does not answer is asleep.
  function look() {
    if (leads) return;
    if (heardAt < askedAt) {
      onState({ state: "connecting", transport: null });
      join({ steal: true });
    }
    askedAt = Date.now();
    post({ ask: true });
  }

  return {
    changed,

    /** Pass on what was heard. Of jobs that are asked for by id, other tabs have other cursors. */
    relay(feed, message, cursor) {
      if (leads) post({ feed, message, cursor: /^job/.test(feed) ? undefined : cursor });
    },
    told(state) {
      now = state;
      if (!leads) return;
      onState(state);
      tell();
    },

    async start() {
      if (stopped && !stopped.signal.aborted) return;
      stopped = new AbortController();
      const { signal } = stopped;
      onState({ state: "connecting", transport: null });
      // Without a token it is not known whose tabs to share with.
      const user = await http.bearer().then((token) => claims(token).sub, (error) => (complain(error), id));
      if (signal.aborted) return;
      name = `statuswire:${http.locate("")}:${user}`;
      bus = new BroadcastChannel(name);
      bus.onmessage = hear;
      // Held from before others hear of this tab until it is gone, or wants nothing any more.
      const stay = () => (changed(true), new Promise((resolve) => signal.addEventListener("abort", resolve)));
      navigator.locks.request(name + id, { signal }, stay).catch(() => {});
      heardAt = askedAt = 0;
      tick = setInterval(look, ASK_MS);
      stopped.capture = true;
      for (const event of ["freeze", "pagehide"]) addEventListener(event, sleep, stopped);
      for (const event of ["resume", "pageshow"]) addEventListener(event, wake, stopped);
      join();
    },

    stop() {
      clearInterval(tick);
      stopped?.abort();
      leave("closed");
      bus?.close();
      bus = undefined;
    },
  };
}
