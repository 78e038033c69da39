// What is watched, and what is known of it. Everything a transport hears comes through `apply`, which drops what was
// there already: so it does not matter how often, over which way, or over how many at once something arrives.
//
// A topic is what somebody watches: `job:ID`, `user:ID`, `channel:NAME` or `all:`. A feed is a set of topics that are
// asked for together and have one cursor.

const FORGOTTEN = 1000; // deleted jobs, and notifications, that are remembered so that they are not shown again
const FEED_JOBS = 150; // a feed's ids go into an address, and proxies take some 8 KB of it

// Completed, cancelled, failed.
export const hasEnded = (job) => /^[cf]/.test(job.status);

/** Call what is not ours: its mistakes are for the console, and stop nothing here. */
export function call(callback, news) {
  try {
    callback?.(news);
  } catch (error) {
    Promise.reject(error);
  }
}

export const topicOf = (what) =>
  typeof what === "string" ? `job:${what}`
  : what.user ? `user:${what.user}`
  : "channel" in what ? `channel:${what.channel ?? ""}`
  : "all:";

export function createStore({ since, changed, learned, shown }) {
  const topics = new Map(); // key -> {kind, name, feed, synced, listeners}
  const jobs = new Map(); // jobId -> record
  const gone = new Map(); // jobId -> {createdAt, version, id}: deleted, by the message `id`
  const notices = new Map(); // by id
  const cursors = new Map(); // feed -> cursor
  let planned;
  let begun;

  const remember = (map, key, value) => {
    map.delete(key);
    map.set(key, value);
    if (map.size > FORGOTTEN) map.delete(map.keys().next().value);
  };

  function feedFor(kind, key) {
    if (kind !== "job") return kind === "channel" ? kind : key;
    const sizes = {};
    for (const { feed } of topics.values()) sizes[feed] = (sizes[feed] ?? 0) + 1;
    let number = 0;
    while (sizes[kind + number] >= FEED_JOBS) number += 1;
    return kind + number;
  }

  // Changes take effect together, and not at all if they were taken back meanwhile.
  function plan() {
    planned ??= queueMicrotask(() => {
      planned = undefined;
      for (const [key, topic] of topics) if (!topic.listeners.size) topics.delete(key);
      const feeds = new Set([...topics.values()].map((topic) => topic.feed));
      for (const feed of cursors.keys()) if (!feeds.has(feed)) cursors.delete(feed);
      for (const [jobId, job] of jobs) if (!topicsOf(job)[0]) jobs.delete(jobId);
      changed();
    }) ?? true;
  }

  function add(key) {
    if (!topics.has(key)) {
      const [, kind, name] = /^(\w+):(.*)/.exec(key);
      const feed = feedFor(kind, key);
      const resumed = since !== undefined && !begun;
      if (!cursors.has(feed)) cursors.set(feed, resumed ? since : undefined);
      // There is no state of a channel, only what comes.
      const synced = resumed || (kind === "channel" && cursors.get(feed) !== undefined);
      topics.set(key, { kind, name, feed, synced, listeners: new Set() });
      plan();
    }
    return topics.get(key);
  }

  const topicsOf = ({ jobId, userId }) => [`job:${jobId}`, `user:${userId}`, "all:"].filter((key) => topics.has(key));

  function tell(key, news) {
    for (const listener of topics.get(key).listeners) call(listener, news);
  }

  function show(job, keys) {
    for (const key of keys) tell(key, job);
    call(shown, job);
  }

  function put(job, force) {
    const { jobId, createdAt, version } = job;
    const known = jobs.get(jobId) ?? gone.get(jobId);
    const isOld =
      known?.createdAt === createdAt ? (force ? version === known.version : version <= known.version)
      : !force && createdAt < known?.createdAt;
    if (isOld) return;
    const keys = topicsOf(job);
    if (keys[0]) {
      jobs.set(jobId, job);
      show(job, keys);
    }
  }

  function drop(message) {
    const { jobId, id } = message;
    const job = jobs.get(jobId);
    if (!job || (id && gone.get(jobId)?.id === id)) return;
    jobs.delete(jobId);
    remember(gone, jobId, { ...job, id });
    show({ ...job, ...message }, topicsOf(job));
  }

  const known = (key) =>
    key.startsWith("job:")
      ? [jobs.get(key.slice(4))].filter(Boolean)
      : [...jobs.values()].filter(({ userId }) => key === "all:" || key === `user:${userId}`);

  return {
    topics,
    known,
    get: (jobId) => jobs.get(jobId),
    /**
     * Take what was heard.
     * @param {string | undefined} feed the one it came over, undefined if over a connection for all of them
     * @param {any} message of the server's, or `{type: "snapshot", jobs, keys, reset?}` of the topics `keys`
     * @param {string | undefined} cursor how far the feed is now; undefined if that is not known
     */
    apply(feed, message, cursor) {
      const { type, id, keys } = message;
      if (type === "snapshot") {
        const there = new Set(message.jobs.map((job) => job.jobId));
        if (message.reset) {
          for (const [jobId, job] of jobs) {
            if (!there.has(jobId) && topicsOf(job).some((key) => keys.includes(key))) drop({ type: "job_deleted", jobId });
          }
        }
        for (const job of message.jobs) put({ ...job, type }, message.reset);
        let isNews;
        for (const key of keys) {
          const topic = topics.get(key);
          if (topic && !topic.synced) isNews = topic.synced = true;
        }
        if (isNews) learned();
      } else if (type === "job_deleted") drop(message);
      else if (type === "notification") {
        if (!notices.has(id)) {
          remember(notices, id);
          for (const [key] of topics) if (key.startsWith("channel")) tell(key, message);
        }
      } else if (message.version) put(message);
      if (cursor !== undefined) {
        begun = true;
        for (const key of feed ? [feed] : cursors.keys()) cursors.set(key, cursor);
      }
    },

    /** What has to be asked for: `{key, kind, names, fresh, cursor}`; of `fresh` nothing is known yet. */
    feeds() {
      const feeds = {};
      for (const { feed, kind, name, synced } of topics.values()) {
        const one = (feeds[feed] ??= { key: feed, kind, names: [], fresh: [] });
        one.names.push(name);
        // Told by another tab, but not as of when: what is asked for then is answered by all there is.
        if (synced) one.cursor = cursors.get(feed) ?? "-";
        else one.fresh.push(name);
      }
      return Object.values(feeds);
    },

    /** Call a function with all that comes of a topic, from what is known on; returns the opposite. */
    listen(key, callback) {
      const { listeners } = add(key);
      let ready;
      const listener = (news) => ready && listeners.has(listener) && callback(news);
      listeners.add(listener);
      queueMicrotask(() => {
        ready = true;
        for (const job of known(key)) listener(job);
      });
      return () => {
        listeners.delete(listener);
        plan();
      };
    },
  };
}
