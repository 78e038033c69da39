// The page: keeps the jobs its feed tells of, and draws the newest of them once per frame.
// A plain module without dependencies; everything it needs is this file, page.css and the server's public API.

const SHOWN = 200; // rows in the document
const KEPT = 1000; // records in memory; those that ended first are let go first
const TOOLTIP_FROM = 40; // characters that fit any row
const ENDED = new Set(["completed", "failed", "cancelled"]);
const TOKEN_KEY = "statuswire.token";

const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;
const CONNECT_MS = 10_000;
// A server that wants a token stays silent until it gets one: after this long without a greeting, ask it why.
const GREETING_MS = 1_500;
const PROBE_MS = 5_000;
// The server's default; its greeting names the real one.
const HEARTBEAT_S = 30;
const UPDATES = new Set(["status_update", "job_completed", "job_failed", "job_cancelled", "job_deleted"]);

const $ = (id) => document.getElementById(id);
const entries = []; // {record, created, at}, newest first
const byId = new Map(); // jobId -> entry
const rows = new Map(); // jobId -> row
const cancelling = new Set(); // jobIds whose cancellation was asked for here
let connection = { name: "connecting", detail: {}, since: performance.now() };
let lastLive = null;
let scheduled = false;

// ---- what is known

function put(record) {
  const known = byId.get(record.jobId);
  const created = Date.parse(record.createdAt) || 0;
  if (known && known.created === created) {
    known.record = record;
    known.at = performance.now();
    return;
  }
  if (known) drop(record.jobId);
  const entry = { record, created, at: performance.now() };
  byId.set(record.jobId, entry);
  entries.splice(placeOf(entry), 0, entry);
  if (entries.length > KEPT * 1.1) prune();
}

// Newest first; jobs of the same moment by id, so that the order never jumps.
function isBefore(one, other) {
  return one.created === other.created ? one.record.jobId < other.record.jobId : one.created > other.created;
}

function placeOf(entry) {
  let low = 0;
  let high = entries.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (isBefore(entries[middle], entry)) low = middle + 1;
    else high = middle;
  }
  return low;
}

function drop(jobId) {
  const entry = byId.get(jobId);
  if (!entry) return;
  byId.delete(jobId);
  cancelling.delete(jobId);
  entries.splice(entries.indexOf(entry), 1);
}

function prune() {
  const oldestFirst = entries.toReversed();
  const least = [...oldestFirst.filter(hasEnded), ...oldestFirst.filter((entry) => !hasEnded(entry))];
  const gone = new Set(least.slice(0, entries.length - KEPT));
  for (const entry of gone) byId.delete(entry.record.jobId);
  const left = entries.filter((entry) => !gone.has(entry));
  entries.splice(0, entries.length, ...left);
}

function hasEnded(entry) {
  return ENDED.has(entry.record.status);
}

// ---- drawing

function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    draw();
  });
}

function draw() {
  const wanted = $("unfinished").checked ? entries.filter((entry) => !hasEnded(entry)) : entries;
  const shown = wanted.slice(0, SHOWN);
  const ids = new Set(shown.map((entry) => entry.record.jobId));
  for (const [jobId, row] of rows) {
    if (ids.has(jobId)) continue;
    row.item.remove();
    rows.delete(jobId);
  }
  // The order only changes by jobs that come and go: rows that stay are never moved, so focus and scrolling stay too.
  let next = $("jobs").firstElementChild;
  for (const entry of shown) {
    let row = rows.get(entry.record.jobId);
    if (!row) rows.set(entry.record.jobId, (row = makeRow(entry.record.jobId)));
    if (row.item === next) next = next.nextElementSibling;
    else $("jobs").insertBefore(row.item, next);
    paint(row, entry);
  }
  drawState();
  drawCounts(wanted.length);
}

function makeRow(jobId) {
  const item = document.createElement("li");
  item.className = "job";
  const part = (tag, name) => {
    const element = document.createElement(tag);
    element.className = name;
    item.append(element);
    return element;
  };
  const row = { item, texts: new Map(), name: part("span", "name"), who: part("span", "who"), badge: part("span", "badge") };
  const bar = part("div", "bar");
  row.progress = document.createElement("progress");
  row.progress.max = 100;
  row.progress.setAttribute("aria-label", `Progress of ${jobId}`);
  row.percent = document.createElement("span");
  row.percent.className = "percent";
  bar.append(row.progress, row.percent);
  row.what = part("span", "what");
  row.when = part("span", "when");
  row.act = part("button", "act");
  row.act.type = "button";
  row.act.setAttribute("aria-label", `Cancel ${jobId}`);
  row.act.addEventListener("click", () => cancel(jobId));
  say(row, "name", jobId);
  return row;
}

// Texts of jobs only ever become text nodes. Untouched ones are left alone: most frames change a few of 200 rows.
function say(row, part, text) {
  if (row.texts.get(part) === text) return;
  row.texts.set(part, text);
  row[part].textContent = text;
  if (text.length > TOOLTIP_FROM) row[part].title = text;
  else row[part].removeAttribute("title");
}

function paint(row, entry) {
  const { record } = entry;
  const ended = hasEnded(entry);
  if (row.item.dataset.status !== record.status) row.item.dataset.status = record.status;
  const attempt = record.attempt > 1 && `attempt ${record.attempt}`;
  say(row, "who", join([record.kind, record.userId, record.parentId && `part of ${record.parentId}`, attempt]));
  say(row, "badge", record.status);
  say(row, "what", what(record));
  say(row, "when", when(entry, ended));
  // A record's progress is 0 until somebody reports one: while it is worked on, that is no number to show.
  const value = record.status === "processing" && !record.progress && !record.steps ? null : (record.progress ?? 0);
  // Rounded down: 100 % is for jobs that are done.
  say(row, "percent", value === null ? "" : `${Math.floor(value)} %`);
  if (row.value !== value) {
    row.value = value;
    if (value === null) row.progress.removeAttribute("value");
    else row.progress.value = value;
  }
  const asked = record.cancelRequested || cancelling.has(record.jobId);
  if (row.act.hidden !== ended) row.act.hidden = ended;
  say(row, "act", asked ? "Cancelling" : "Cancel");
  // Not `disabled`, which would throw the keyboard's focus away.
  if (row.asked !== asked) row.act.setAttribute("aria-disabled", String((row.asked = asked)));
}

function what(record) {
  const { status, steps } = record;
  if (status === "failed" || status === "stalled") return asText(record.error ?? record.message);
  if (ENDED.has(status)) return asText(record.message);
  const doing = asText(record.currentOperation ?? record.message);
  const count = steps?.total === undefined ? "" : `${steps.done ?? 0}/${steps.total}`;
  return join([record.stage, doing, !doing.includes(count) && count, steps?.failed && `${steps.failed} failed`]);
}

function when({ record, at }, ended) {
  if (ended) {
    const end = new Date(record.endedAt ?? record.timestamp);
    return Number.isNaN(end.getTime()) ? "" : `at ${end.toLocaleTimeString()}`;
  }
  if (record.status !== "processing" || record.estimatedTimeRemaining === undefined) return "";
  const left = Math.round(record.estimatedTimeRemaining - (performance.now() - at) / 1000);
  return left > 0 ? `${duration(left)} left` : "any moment";
}

function duration(seconds) {
  const two = (number) => String(number).padStart(2, "0");
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${two(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
}

function join(parts) {
  return parts.filter(Boolean).map(asText).join(" · ");
}

function asText(value) {
  if (value === undefined || value === null) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}

function drawState() {
  const { name, detail, since } = connection;
  const words = { connecting: "Connecting", live: "Live", reconnecting: "Reconnecting", offline: "Offline", token: "Token needed" };
  const seconds = detail.retryInMs === undefined ? 0 : Math.ceil((detail.retryInMs - (performance.now() - since)) / 1000);
  const more = [
    name !== "token" && detail.why,
    seconds > 0 && `next try in ${seconds} s`,
    lastLive && name !== "live" && `shown as of ${lastLive.toLocaleTimeString()}`,
  ];
  if ($("state").dataset.state !== name) $("state").dataset.state = name;
  // Apart, because what is announced to a screen reader must not change every second.
  write($("state-text"), words[name]);
  write($("state-more"), join(more));
  $("summary").hidden = name === "token";
  $("retry").hidden = detail.retryInMs === undefined;
  $("jobs").classList.toggle("stale", name !== "live");
  $("forget").hidden = sessionStorage.getItem(TOKEN_KEY) === null;
  if (name === "live") $("token-form").hidden = true;
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function drawCounts(wanted) {
  const counts = new Map();
  for (const { record } of entries) counts.set(record.status, (counts.get(record.status) ?? 0) + 1);
  const order = ["processing", "queued", "stalled", "completed", "failed", "cancelled"];
  write($("counts"), join(order.map((status) => counts.has(status) && `${counts.get(status)} ${status}`)));
  const running = counts.get("processing") ?? 0;
  const title = running && connection.name === "live" ? `${running} running · Statuswire` : "Statuswire";
  if (document.title !== title) document.title = title;
  $("empty").hidden = wanted > 0 || connection.name !== "live";
  write($("empty"), entries.length ? "All jobs have ended." : "No jobs yet. They appear here as soon as one is published.");
  $("more").hidden = wanted <= SHOWN;
  write($("more"), `The newest ${SHOWN} of ${wanted} jobs are shown.`);
}

// ---- what a person does

async function cancel(jobId) {
  const row = rows.get(jobId);
  if (!row || row.asked) return;
  cancelling.add(jobId);
  schedule();
  try {
    const url = address(`api/v2/jobs/${encodeURIComponent(jobId)}/cancel`);
    const answer = await fetch(url, { method: "POST", headers: feed.authorization() });
    if (!answer.ok && answer.status !== 409) {
      const error = (await answer.json().catch(() => null))?.error;
      throw new Error(error?.message ?? `the server answers ${answer.status}`);
    }
    notice("");
  } catch (error) {
    notice(`${jobId} was not cancelled: ${error.message}`);
  }
  cancelling.delete(jobId); // from here on its record tells
  schedule();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function askForToken(why) {
  $("token-why").textContent = why ? `The last one was refused: ${why}` : "";
  $("token-why").hidden = !why;
  $("token-form").hidden = false;
  $("token").focus();
}

// Another token is another person: nothing of the last one's jobs may stay.
function becomeSomeoneElse() {
  entries.length = 0;
  byId.clear();
  cancelling.clear();
  lastLive = null;
  feed.forgetCursor();
  notice("");
  connection = { name: "connecting", detail: {}, since: performance.now() };
  feed.connect();
  schedule();
}

// ---- the feed: jobs as they happen, over a WebSocket or an EventSource, with one cursor for both.
//
// `createFeed` keeps one connection alive and tells its owner about
//   snapshot(records)      everything watched; replaces what was known
//   update(message)        one job's new record, or `job_deleted`
//   state(name, detail)    "connecting" | "live" | "reconnecting" | "offline" | "token"; detail: {why?, retryInMs?}
//   problem(text)          something the server complained of
// After a break it resumes behind the last update it was given, so nothing is missed or repeated.

// Relative addresses keep working when the server sits below a path of a proxy.
const address = (path) => new URL(path, document.baseURI);

function createFeed({ token, forgetToken, snapshot, update, state, problem }) {
  let transport = "websocket";
  let cursor = null;
  let attempt = 0; // numbers the connections: what a former one still says is ignored
  let close = null; // ends the present connection; null while there is none
  let wanted = false; // false until the first `connect` and while a token is missing
  let failures = 0; // since it was last live
  let parts = null; // records of an unfinished snapshot
  let heartbeatMs = HEARTBEAT_S * 1000;
  let lastHeard = 0;
  let timer = 0; // for the next attempt, or for a greeting that stays away

  function connect() {
    disconnect();
    wanted = true;
    lastHeard = performance.now();
    state("connecting", {});
    close = transport === "sse" ? openEventSource() : openWebSocket();
  }

  function disconnect() {
    attempt += 1;
    clearTimeout(timer);
    parts = null;
    close?.();
    close = null;
  }

  // A handler that works only while the connection it was made for is the present one.
  function here(handler) {
    const mine = attempt;
    return (...args) => {
      if (mine === attempt) handler(...args);
    };
  }

  function openWebSocket() {
    const url = address("ws/jobs");
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url, ["statuswire.v1"]);
    const send = (message) => socket.send(JSON.stringify(message));
    const silent = here(() => comeBack("The server does not answer"));
    timer = setTimeout(silent, CONNECT_MS);
    socket.onopen = here(() => {
      // In a message and not in the address: addresses end up in the logs of proxies.
      if (token()) send({ type: "auth", token: token() });
      clearTimeout(timer);
      timer = setTimeout(silent, GREETING_MS);
    });
    socket.onmessage = here(({ data }) => {
      const message = JSON.parse(data);
      lastHeard = performance.now();
      receive(message, message.id);
      if (message.type === "connected") {
        clearTimeout(timer);
        send({ type: "subscribe", ...(cursor && { last_seen: cursor }) });
      } else if (message.type === "subscribed" || message.type === "reset") {
        if (!message.recovered) take(message.snapshot ?? [], message.more);
        if (!message.more) live(message.id);
      }
    });
    socket.onclose = here(({ code, reason }) => {
      if (code === 4401 || code === 4408) return refused(reason);
      if (code === 1008 || code === 4429) problem(reason || "The server closed the connection");
      // 1001 and 1013 name a delay in milliseconds, spread so that not everyone comes back at once.
      const delay = code === 1001 || code === 1013 ? /\d+/.exec(reason) : null;
      if (delay) retry("reconnecting", "The server asked for a pause", Number(delay[0]));
      else comeBack();
    });
    return () => socket.close();
  }

  function openEventSource() {
    const url = address("api/v2/jobs/stream");
    if (token()) url.searchParams.set("access_token", token()); // EventSource cannot send a header of ours
    if (cursor) url.searchParams.set("last_seen", cursor);
    const source = new EventSource(url);
    let behind = cursor === null; // until the snapshot is whole, what is shown is not the present state
    source.onmessage = here((event) => {
      const message = JSON.parse(event.data);
      lastHeard = performance.now();
      if (message.type === "reset") {
        behind = true;
      } else if (message.type === "snapshot") {
        take(message.jobs, message.more);
        behind = Boolean(message.more);
      }
      receive(message, event.lastEventId);
      if (!behind) live(event.lastEventId);
    });
    source.onerror = here(() => {
      // It comes back by itself, with the server's `retry:` and our last id; only after a 4xx or 5xx it gives up.
      if (source.readyState === EventSource.CLOSED) return comeBack();
      parts = null;
      failures += 1;
      state("reconnecting", {});
      probe().then(
        here(({ reached, why }) => {
          if (!reached && source.readyState !== EventSource.OPEN) state("offline", { why });
        }),
      );
    });
    return () => source.close();
  }

  function receive(message, id) {
    if (UPDATES.has(message.type)) {
      update(message);
      live(id);
    } else if (message.type === "heartbeat") {
      live(id);
    } else if (message.type === "connected") {
      heartbeatMs = (message.heartbeat ?? HEARTBEAT_S) * 1000;
    } else if (message.type === "error" && message.code !== "try_later") {
      problem(message.message);
    }
  }

  // What is shown is the state as of `id`.
  function live(id) {
    if (id) cursor = id;
    failures = 0;
    state("live", {});
  }

  function take(records, more) {
    parts = (parts ?? []).concat(records);
    if (more) return;
    snapshot(parts);
    parts = null;
  }

  // A connection ended or stays silent: find out why, say so, and try again later.
  function comeBack(guess) {
    disconnect();
    state("reconnecting", { why: guess });
    probe().then(
      here(({ reached, unauthorized, why }) => {
        if (unauthorized) refused(why);
        else retry(reached ? "reconnecting" : "offline", why ?? guess, backoff());
      }),
    );
  }

  function retry(name, why, delayMs) {
    disconnect();
    failures += 1;
    state(name, { why, retryInMs: delayMs });
    timer = setTimeout(connect, delayMs);
  }

  function backoff() {
    return Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** failures) * (0.5 + Math.random() / 2);
  }

  // The server wants another token, or a first one; unless it wants none at all, and it was ours that was wrong.
  function refused(why) {
    disconnect();
    const had = token() !== null;
    forgetToken();
    probe().then(
      here(({ reached, unauthorized }) => {
        if (reached && !unauthorized) return connect();
        wanted = false;
        state("token", { why: had ? why : "" });
      }),
    );
  }

  // Neither WebSocket nor EventSource tells a script why it was refused; a plain request does.
  async function probe() {
    if (!navigator.onLine) return { reached: false, why: "This device is offline" };
    const signal = AbortSignal.timeout(PROBE_MS);
    try {
      const answer = await fetch(address("api/v2/jobs?limit=1"), { signal, headers: authorization(), cache: "no-store" });
      if (answer.ok) return { reached: true };
      const error = (await answer.json().catch(() => null))?.error;
      return { reached: true, unauthorized: answer.status === 401, why: error?.message ?? `It answers ${answer.status}` };
    } catch {
      return { reached: false, why: "The server cannot be reached" };
    }
  }

  function authorization() {
    return token() ? { Authorization: `Bearer ${token()}` } : {};
  }

  // A connection can die without a word (sleep, another network): heartbeats that stay away tell.
  setInterval(() => {
    if (close && performance.now() - lastHeard > 2.5 * heartbeatMs) comeBack("The connection went silent");
  }, 1_000);
  window.addEventListener("online", () => wanted && connect());
  window.addEventListener("offline", () => wanted && comeBack());

  return {
    authorization,
    connect,
    use(name) {
      transport = name;
      if (wanted) connect();
    },
    forgetCursor() {
      cursor = null;
    },
  };
}

// ---- putting it together

const feed = createFeed({
  token: () => sessionStorage.getItem(TOKEN_KEY),
  forgetToken: () => sessionStorage.removeItem(TOKEN_KEY),
  snapshot(records) {
    entries.length = 0;
    byId.clear();
    for (const record of records) put(record);
    schedule();
  },
  update({ type, id, ...record }) {
    if (type === "job_deleted") drop(record.jobId);
    else put(record);
    schedule();
  },
  state(name, detail) {
    if (name === "live") lastLive = new Date();
    if (name === "live" && connection.name !== "live") notice("");
    if (name === "token" && connection.name !== "token") askForToken(detail.why);
    connection = { name, detail, since: performance.now() };
    schedule();
  },
  problem: notice,
});

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, $("token").value.trim());
  $("token").value = "";
  becomeSomeoneElse();
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN_KEY);
  becomeSomeoneElse();
});
$("retry").addEventListener("click", () => feed.connect());
$("unfinished").addEventListener("change", schedule);
for (const choice of document.querySelectorAll("input[name=transport]")) {
  choice.addEventListener("change", () => feed.use(choice.value));
  // A browser that restores a form on reload restores the choice too.
  if (choice.checked) feed.use(choice.value);
}

setInterval(schedule, 1_000); // times that count down
feed.connect();
