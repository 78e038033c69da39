// What is watched, and what is known of it. Everything a transport hears comes through `apply`, which drops what was
// there already: so it does not matter how often, over which way, or over how many at once something arrives.

const FORGOTTEN = 1000; // deleted jobs, and notifications, that are remembered so that they are not shown again
// A jobs' ids go into an address, and proxies take some 8 KB of it.
const FEED_CHARACTERS = 6000;
const FEED_JOBS = 1000;

export const hasEnded = (job) => /^(completed|failed|cancelled)$/.test(job.status);

export function createStore({ since, changed, shown }) {
  const topics = new Map(); // key -> {key, kind, name, feed, synced, listeners}
  const jobs = new Map(); // jobId -> record
  const gone = new Map(); // jobId -> {createdAt, version, id}: deleted, by the message `id`
  const notices = new Set(); // ids of notifications
  const cursors = new Map(); // feed -> cursor
  let extra = []; // topics that other tabs want
  let keys = new Set(); // feeds
  let planned = false;
  let begun = false;

  function topicOf(what) {
    const [kind, name] =
      typeof what === "string" ? ["job", what]
      : what.user ? ["user", what.user]
      : "channel" in what ? ["channel", what.channel ?? ""]
      : ["all", ""];
    return { kind, name, key: `${kind}:${name}` };
  }

  // Jobs share a feed until their ids fill an address; a user's jobs are a feed of their own.
  function feedFor({ kind, name, key }) {
    if (kind !== "job") return kind === "channel" ? kind : key;
    const sizes = new Map();
    for (const topic of topics.values()) {
      if (topic.kind === kind) sizes.set(topic.feed, (sizes.get(topic.feed) ?? 0) + topic.name.length + 3 + FEED_CHARACTERS / FEED_JOBS);
    }
    let number = 0;
    while (sizes.get(`job${number}`) > FEED_CHARACTERS) number += 1;
    return `job${number}`;
  }

  // Changes take effect together, and not at all if they were taken back meanwhile.
  function plan() {
    if (planned) return;
    planned = true;
    queueMicrotask(() => {
      planned = false;
      for (const topic of topics.values()) if (!topic.listeners.size && !extra.includes(topic.key)) topics.delete(topic.key);
      keys = new Set([...topics.values()].map((topic) => topic.feed));
      for (const key of cursors.keys()) if (!keys.has(key)) cursors.delete(key);
      for (const job of jobs.values()) if (!topicsOf(job).length) jobs.delete(job.jobId);
      changed();
    });
  }

  function add(topic) {
    const known = topics.get(topic.key);
    if (known) return known;
    const added = { ...topic, feed: feedFor(topic), synced: false, listeners: new Set() };
    if (since !== undefined && !begun) {
      cursors.set(added.feed, since);
      added.synced = true;
    }
    topics.set(topic.key, added);
    keys.add(added.feed);
    plan();
    return added;
  }

  function topicsOf(job) {
    return [`job:${job.jobId}`, `user:${job.userId}`, "all:"].map((key) => topics.get(key)).filter(Boolean);
  }

  function tell(topic, news) {
    for (const listener of topic.listeners) {
      try {
        listener(news);
      } catch (error) {
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }

  function show(job) {
    for (const topic of topicsOf(job)) tell(topic, job);
    shown(job);
  }

  function put(job, force) {
    const known = jobs.get(job.jobId) ?? gone.get(job.jobId);
    if (known) {
      const newer = job.createdAt === known.createdAt ? job.version - known.version : job.createdAt > known.createdAt ? 1 : -1;
      if (force ? newer === 0 : newer <= 0) return;
    }
    jobs.set(job.jobId, job);
    show(job);
  }

  function drop(message) {
    const { jobId, id } = message;
    const job = jobs.get(jobId);
    if (!job || (id && gone.get(jobId)?.id === id)) return;
    jobs.delete(jobId);
    gone.delete(jobId);
    gone.set(jobId, { createdAt: job.createdAt, version: job.version, id });
    if (gone.size > FORGOTTEN) gone.delete(gone.keys().next().value);
    show({ ...job, ...message });
  }

  /** Whether a snapshot of a feed (undefined: of all; `names`: only of these jobs) would have to have a job. */
  function covers(feed, names, job) {
    return topicsOf(job).some((topic) => (!feed || topic.feed === feed) && (!names || names.includes(topic.name)));
  }

  function takeSnapshot(feed, { jobs: records, names, reset }) {
    if (reset) {
      const there = new Set(records.map((job) => job.jobId));
      for (const job of [...jobs.values()]) {
        if (!there.has(job.jobId) && covers(feed, names, job)) drop({ type: "job_deleted", jobId: job.jobId });
      }
    }
    for (const job of records) {
      job.type = "snapshot";
      put(job, reset);
    }
    for (const topic of topics.values()) {
      if ((!feed || topic.feed === feed) && (!names || names.includes(topic.name))) topic.synced = true;
    }
  }

  return {
    topicOf,

    /**
     * Take what was heard.
     * @param {string | undefined} feed the one it came over, undefined if over a connection for all of them
     * @param {any} message of the server's, or `{type: "snapshot", jobs, names?, reset?}`; `id`, if it has one, is how far
     *   the feed is now
     */
    apply(feed, message) {
      const { type, id } = message;
      if (type === "snapshot") takeSnapshot(feed, message);
      else if (type === "job_deleted") drop(message);
      else if (type === "notification") {
        if (!notices.has(id)) {
          notices.add(id);
          if (notices.size > FORGOTTEN) notices.delete(notices.values().next().value);
          for (const topic of topics.values()) if (topic.kind === "channel") tell(topic, message);
        }
      } else if (message.version) put(message);
      const at = "at" in message ? message.at : id;
      if (at !== undefined) {
        begun = true;
        if (feed) cursors.set(feed, at);
        else for (const key of keys) cursors.set(key, at);
      }
    },

    /** What has to be asked for: `{key, kind, names, fresh, cursor}`, where `fresh` are names of which nothing is known yet. */
    feeds() {
      const feeds = new Map();
      for (const { feed: key, kind, name, synced } of topics.values()) {
        if (!feeds.has(key)) feeds.set(key, { key, kind, names: [], fresh: [], cursor: cursors.get(key) });
        feeds.get(key).names.push(name);
        if (!synced) feeds.get(key).fresh.push(name);
      }
      for (const feed of feeds.values()) if (feed.fresh.length === feed.names.length) feed.cursor = undefined;
      return [...feeds.values()];
    },

    /** Call a function with all that comes of a topic, from what is known on; returns the opposite. */
    listen(what, listener) {
      const topic = add(topicOf(what));
      // One of its own, so that a function may be given twice.
      const own = (news) => listener(news);
      queueMicrotask(() => {
        if (!off) for (const job of known(topic)) own(job);
        if (!off) topic.listeners.add(own);
      });
      let off = false;
      const hold = () => {};
      topic.listeners.add(hold);
      return () => {
        if (off) return;
        off = true;
        topic.listeners.delete(own);
        topic.listeners.delete(hold);
        plan();
      };
    },

    known: (what) => known(topicOf(what)),
    get: (jobId) => jobs.get(jobId),
    keys: () => [...topics.keys()],

    /** Watch for other tabs, too. */
    wantFor(topicKeys) {
      extra = topicKeys;
      for (const key of extra) {
        const [, kind, name] = /^(\w+):(.*)$/.exec(key);
        add({ kind, name, key });
      }
      plan();
    },
  };

  function known({ kind, name }) {
    if (kind === "job") return jobs.has(name) ? [jobs.get(name)] : [];
    return kind === "channel" ? [] : [...jobs.values()].filter((job) => kind === "all" || job.userId === name);
  }
}
