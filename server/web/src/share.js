// One connection for all tabs. The tab that holds the lock leads: it alone is connected, watches for all, and passes on
// what it hears. All have what all watch, and the cursors, so whoever leads next goes on where the last one was.

const ASK_MS = 5000;

/** The same as the connection, for which it stands in. */
export function createShare({ http, store, connection, onState, complain }) {
  const id = String(Math.random());
  const tabs = new Map(); // what other tabs watch, for the one that leads
  let name; // of the lock and the channel
  let bus;
  let queue; // aborts waiting for the lock
  let leads; // gives the lock back
  let said = {}; // what the leader last said of itself
  let heardAt;
  let askedAt;
  let told; // what was last said of our own topics
  let tick;

  const post = (message) => bus?.postMessage(message);
  const me = () => (leads ? connection : said);

  function tell() {
    const { state, transport, error } = connection;
    const wanted = [...new Set([...store.own(), ...[...tabs.values()].flat()])];
    store.wantFor(wanted);
    post({ state, transport, wanted, error: error && { code: error.code, message: error.message } });
  }

  function changed(force) {
    const topics = store.own();
    if (leads) connection.changed();
    if (!force && told === String(topics)) return;
    told = String(topics);
    if (leads) tell();
    else post({ tab: id, topics });
  }

  async function join(options) {
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
    if (leads) {
      said = {};
      leads = undefined;
      connection.stop();
    }
    if (!mine.signal.aborted) join();
  }

  function leave() {
    queue?.abort();
    leads?.();
  }

  function hear({ data }) {
    const { tab, topics, feed, message, cursor } = data;
    if (leads) {
      if (data.ask) tell();
      if (!tab) return;
      // It holds that lock for as long as it lives.
      if (!tabs.has(tab)) navigator.locks.request(name + tab, () => tabs.delete(tab) && tell());
      tabs.set(tab, topics);
      tell();
      post({ message: { type: "snapshot", ...store.state(topics) } });
    } else if (!tab && !data.ask) {
      heardAt = Date.now();
      if (data.who) changed(true);
      else if (message) store.apply(feed, message, cursor);
      else {
        said = data;
        store.wantFor(data.wanted);
        onState();
      }
    }
  }

  // Who leads but does not answer is asleep.
  function look() {
    if (leads) return;
    if (heardAt < askedAt) {
      said = {};
      onState();
      queue.abort();
      join({ steal: true });
    }
    askedAt = Date.now();
    post({ ask: true });
  }

  return {
    get state() {
      return me().state ?? "connecting";
    },
    get transport() {
      return me().transport ?? null;
    },
    get error() {
      return me().error;
    },
    changed,

    /** Pass on what was heard. Of jobs that are asked for by id, other tabs have other cursors. */
    relay(feed, message, cursor) {
      if (leads) post({ feed, message, cursor: /^job/.test(feed) ? undefined : cursor });
    },
    told: () => leads && tell(),

    async start() {
      await http.bearer().catch(complain);
      name = `statuswire:${http.locate("")}:${http.user()}`;
      bus = new BroadcastChannel(name);
      bus.onmessage = hear;
      navigator.locks.request(name + id, () => new Promise(() => {}));
      heardAt = askedAt = 0;
      tick = setInterval(look, ASK_MS);
      for (const event of ["freeze", "pagehide"]) (event === "freeze" ? document : window).addEventListener(event, leave);
      for (const event of ["resume", "pageshow"]) (event === "resume" ? document : window).addEventListener(event, () => join());
      join();
      changed(true);
    },

    stop() {
      clearInterval(tick);
      leave();
      said = { state: "closed" };
      bus.close();
      onState();
    },
  };
}
