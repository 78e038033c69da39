// The dashboard: who looks, over which connection, and what of it is drawn, at most once a frame.

import { connect } from "./client.js";
import { $, STATUSES, amount, button, clock, join, write } from "./dom.js";
import { createJobs } from "./jobs.js";
import { createList } from "./list.js";
import { createPlayground } from "./playground.js";
import { setToken, token, whoAmI } from "./session.js";
import { createStats } from "./stats.js";
import { createTimeline } from "./timeline.js";

const TRANSPORTS = { websocket: "WebSocket", sse: "SSE", longpoll: "long-poll", poll: "polling" };
const WORDS = { connecting: "Connecting", live: "Live", reconnecting: "Reconnecting", offline: "Offline", token: "Token needed", closed: "Closed" };
// What the client says of it in one word.
const WHY = {
  unreachable: "the server cannot be reached",
  timeout: "the server does not answer",
  offline: "this device is offline",
};
// Orders that change with every update are not made anew more often, nor with more than a share of the time.
const VIEW_MS = 400;
const VIEW_SHARE = 0.05;

let client = null;
let watching = null; // all jobs, by the client
let me = null;
let round = 0; // numbers those who looked: what is still on its way for a former one is ignored
let state = { name: "connecting", since: Date.now(), transport: null, why: "" };
let lastLive = null; // the moment until which what is shown was true
let whole = false; // all that the connection will begin with is here
let scheduled = false;
let choiceChanged = true;
let nextView = 0; // when another order may be made
let pendingView = 0; // the timer that waits for it
let shown = 0;
let running = 0;

const jobs = createJobs();
const choice = { text: "", statuses: new Set(), kind: "", user: "", sort: "created" };
const chips = new Map();
const list = createList({ box: $("jobs"), sizer: $("sizer"), onScroll: schedule, onOpen: openTimeline });
const timeline = createTimeline({
  root: $("timeline"),
  ask,
  complain,
  schedule,
  onClose() {
    $("split").classList.remove("open");
    list.mark(null);
    $("jobs").focus();
    schedule();
  },
});
const stats = createStats();
const playground = createPlayground();

// ---- who looks, and the connection

/** Begin anew, as whoever the token stands for. */
async function begin() {
  const mine = (round += 1);
  end();
  become("connecting");
  try {
    await identify(mine);
  } catch (error) {
    if (mine !== round) return;
    if (error.status === 401) return askForToken(error);
    // The client tries again by itself; who looks is found out as soon as it is connected.
    complain(error.message);
  }
  if (mine === round) open();
}

async function identify(mine) {
  let who;
  try {
    who = await whoAmI();
  } catch (error) {
    // A cookie, or nothing at all, may be enough where a token from elsewhere is not.
    if (error.status !== 401 || token() === undefined) throw error;
    const refused = token();
    setToken();
    who = await whoAmI().catch(() => null);
    if (!who) throw Object.assign(error, { refused });
  }
  if (mine !== round) return;
  me = who;
  $("token-form").hidden = true;
  $("everything").hidden = false;
  complain("");
  use();
}

/** Another transport, the same one who looks: what is shown stays until it is replaced. */
function open() {
  client?.disconnect();
  whole = false;
  const transport = $("transport").value;
  const mine = connect({
    url: document.baseURI,
    getToken: () => token(),
    ...(transport && { transports: [transport] }),
    onError: (error) => client === mine && error.code === "rate_limited" && complain(error.message),
  });
  client = mine;
  mine.onState(() => client === mine && follow());
  watching = mine.watch({ all: true }, (record) => client === mine && hear(record));
  follow();
}

function end() {
  const before = client;
  client = null;
  before?.disconnect();
  me = null;
  lastLive = null;
  jobs.clear();
  list.set([]);
  timeline.close();
  use();
}

function use() {
  playground.use(me);
  stats.show(me && !$("panel-server").hidden ? me : null);
  write($("me"), me ? (me.admin ? `${me.userId}, admin` : me.userId) : "");
  $("forget").hidden = token() === undefined;
}

function hear(record) {
  if (record.type === "job_deleted") jobs.drop(record.jobId);
  else jobs.put(record);
  timeline.hear(record);
  schedule();
}

function follow() {
  const { error } = client;
  if (client.state === "closed" && (error?.status === 401 || error?.code === "unauthorized")) return begin();
  if (client.live) {
    become("live", client.transport);
    // Its callbacks come in this very turn: by then all that it knows has been heard.
    queueMicrotask(settle);
    if (!me) identify(round).catch((problem) => problem.status === 401 && askForToken(problem));
    return;
  }
  const name = { connecting: lastLive ? "reconnecting" : "connecting", offline: "offline", closed: "closed" }[client.state];
  become(name, state.transport, WHY[error?.code] ?? error?.message ?? "");
}

function settle() {
  if (!client?.live || whole) return;
  whole = choiceChanged = true;
  jobs.keep(new Set(watching.jobs.map((record) => record.jobId)));
  if (timeline.jobId !== null) timeline.refresh();
  schedule();
}

function become(name, transport = null, why = "") {
  if (state.name === "live" && name !== "live") lastLive = Date.now();
  const anew = state.name !== name || (name === "live" && state.transport !== transport);
  state = { name, transport, why, since: anew ? Date.now() : state.since };
  if (name === "live") lastLive = Date.now();
  schedule();
}

function askForToken(error) {
  const refused = error.refused !== undefined;
  end();
  setToken();
  become("token");
  $("everything").hidden = true;
  $("forget").hidden = true;
  write($("token-why"), refused ? `The last one was refused: ${error.message}` : "");
  $("token-why").hidden = !refused;
  $("token-form").hidden = false;
  complain("");
  $("token").focus();
}

// ---- drawing

function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame((now) => {
    scheduled = false;
    draw(now);
  });
}

function draw(now) {
  const live = state.name === "live";
  drawState(live);
  if ($("everything").hidden || $("panel-jobs").hidden) return;
  if (choiceChanged || jobs.hasNews(choice)) {
    if (choiceChanged || now >= nextView) arrange(now);
    else if (!pendingView) pendingView = setTimeout(() => ((pendingView = 0), schedule()), nextView - now);
  }
  list.draw(live);
  timeline.draw(now);
}

function arrange(now) {
  const began = performance.now();
  choiceChanged = false;
  const { entries, counts, kinds, users } = jobs.view(choice);
  shown = entries.length;
  list.set(entries);
  running = counts.get("processing") ?? 0;
  for (const [status, chip] of chips) {
    const count = counts.get(status) ?? 0;
    write(chip, `${status} ${amount(count)}`);
    chip.classList.toggle("none", count === 0);
  }
  offer($("kind"), "all kinds", kinds);
  offer($("user"), "all users", users);
  count();
  nextView = now + Math.max(VIEW_MS, (performance.now() - began) / VIEW_SHARE);
}

function count() {
  const all = `${amount(jobs.size)} ${jobs.size === 1 ? "job" : "jobs"}`;
  // Until the first snapshot is whole there is no number to be given.
  write($("counts"), !whole && !jobs.size ? "" : shown === jobs.size ? all : `${amount(shown)} of ${all}`);
}

function offer(select, all, names) {
  const wanted = ["", ...[...names].sort()];
  if (select.value && !names.has(select.value)) wanted.push(select.value);
  select.parentElement.hidden = names.size < 2 && !select.value;
  const known = [...select.options].map((option) => option.value);
  if (known.length === wanted.length && known.every((value, at) => value === wanted[at])) return;
  const chosen = select.value;
  select.replaceChildren(...wanted.map((name) => new Option(name || all, name)));
  select.value = chosen;
}

function drawState(live) {
  const { name, transport, since, why } = state;
  if ($("state").dataset.state !== name) $("state").dataset.state = name;
  // Apart, because what is announced to a screen reader must not change every second.
  write($("state-text"), live ? `Live by ${TRANSPORTS[transport] ?? transport}` : WORDS[name]);
  write(
    $("state-more"),
    join([
      live && `since ${clock(since)}`,
      !live && name !== "token" && why,
      !live && lastLive && `not live since ${clock(lastLive)}${transport ? `, until then by ${TRANSPORTS[transport]}` : ""}`,
    ]),
  );
  $("retry").hidden = !["offline", "reconnecting", "closed"].includes(name);
  $("split").classList.toggle("stale", !live);
  const title = running && live ? `${amount(running)} running · Statuswire` : "Statuswire";
  if (document.title !== title) document.title = title;
  const nothing = emptiness(live);
  $("empty").hidden = nothing === "";
  write($("empty"), nothing);
}

// Why there is nothing in the list, as far as that is known.
function emptiness(live) {
  if (shown > 0) return "";
  if (jobs.size) return "No job fits these filters.";
  if (live && whole) return "No jobs yet. They appear here as soon as one is published.";
  return live || state.name === "connecting" ? "Loading jobs" : "";
}

function complain(text) {
  write($("notice"), text);
  $("notice").hidden = !text;
}

// ---- what a person does

function openTimeline(jobId) {
  if (!me) return;
  $("split").classList.add("open");
  list.mark(jobId);
  timeline.open(jobId, jobs.get(jobId)?.record, me);
  schedule();
}

/** Whether a person agrees. */
function ask(text, yes) {
  const dialog = $("confirm");
  write($("confirm-text"), text);
  write($("confirm-yes"), yes);
  dialog.returnValue = "";
  dialog.showModal();
  $("confirm-no").focus();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

function select(tab) {
  for (const one of $("tabs").children) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", chosen);
    one.tabIndex = chosen ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  stats.show(me && !$("panel-server").hidden ? me : null);
  schedule();
}

function choose(changes) {
  Object.assign(choice, changes);
  choiceChanged = true;
  schedule();
}

for (const status of STATUSES) {
  const chip = button(status, () => {
    if (!choice.statuses.delete(status)) choice.statuses.add(status);
    chip.setAttribute("aria-pressed", choice.statuses.has(status));
    choose({});
  });
  chip.className = "chip";
  chip.dataset.status = status;
  chip.setAttribute("aria-pressed", "false");
  chips.set(status, chip);
  $("statuses").append(chip);
}
for (const name of ["kind", "user", "sort"]) $(name).addEventListener("change", () => choose({ [name]: $(name).value }));
$("text").addEventListener("input", () => choose({ text: $("text").value.trim() }));
$("tabs").addEventListener("click", (event) => event.target.closest("[role=tab]") && select(event.target));
$("tabs").addEventListener("keydown", (event) => {
  const tabs = [...$("tabs").children];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const to = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
  select(to);
  to.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("confirm").open && timeline.jobId !== null && !event.defaultPrevented) timeline.close();
});
$("confirm-yes").addEventListener("click", () => $("confirm").close("yes"));
$("confirm-no").addEventListener("click", () => $("confirm").close(""));
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken($("token").value.trim());
  $("token").value = "";
  begin();
});
$("forget").addEventListener("click", () => {
  setToken();
  begin();
});
$("retry").addEventListener("click", () => client?.reconnect());
$("transport").addEventListener("change", () => client && open());

setInterval(schedule, 1000); // times that count down
// A browser that restores a form on reload restores the choice too, but not before this.
choice.sort = $("sort").value || "created";
choice.text = $("text").value.trim();
begin();
