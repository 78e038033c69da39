// The server's own numbers and who is connected, asked for every few seconds while somebody looks.

import { $, amount, bytes, clock, curve, duration, el, write } from "./dom.js";
import { call } from "./session.js";

const EVERY_MS = 3000;
const POINTS = 100; // of a curve: five minutes
const PAGE = 50;

const perSecond = (read) => (now, before, seconds) => (before && seconds > 0 ? Math.max(0, read(now) - read(before)) / seconds : undefined);
const published = (stats) => Object.values(stats.published).reduce((sum, source) => sum + (source.accepted ?? 0), 0);
const ms = (value) => (typeof value === "number" ? `${amount(value)} ms` : "–");

// Cards: a title, then lines of [words, value]; a curve has `rate(now, before, seconds)`.
const CARDS = [
  {
    title: "Connections",
    lines: (stats) => [
      ["open", amount(stats.activeConnections)],
      ...Object.entries(stats.byTransport).map(([name, count]) => [name, amount(count), count / Math.max(1, stats.activeConnections)]),
    ],
  },
  {
    title: "Health",
    lines: (stats) => [
      ...Object.entries(stats.connectionHealth).map(([name, count]) => [name, amount(count)]),
      ["average time", duration(stats.averageConnectionTime)],
      ["errors", amount(stats.connectionErrors)],
    ],
  },
  {
    title: "Published",
    unit: "updates/s",
    rate: perSecond((stats) => stats.shown),
    lines: (stats) => [
      ["accepted", amount(published(stats))],
      ["in the log", amount(stats.history.updates)],
    ],
  },
  {
    title: "Delivered",
    unit: "updates/s",
    rate: perSecond((stats) => stats.messagesDelivered),
    lines: (stats) => [
      ["in all", amount(stats.messagesDelivered)],
      ["newest only", amount(stats.conflated)],
    ],
  },
  {
    title: "Delivery time",
    lines: (stats) => [
      ["half within", ms(stats.deliveryLatencyMs.p50)],
      ["99 % within", ms(stats.deliveryLatencyMs.p99)],
      ["loop lag", ms(stats.process.loopLagMs)],
    ],
  },
  {
    title: "Store",
    state: (stats) => (stats.broker.available ? "" : "bad"),
    lines: (stats) => [
      ["kind", stats.broker.store],
      ["state", stats.broker.available ? "available" : `away: ${stats.broker.reason}`],
      ["log at", amount(stats.broker.offset)],
      ["logs lost", amount(stats.broker.logsLost)],
    ],
  },
  {
    title: "Jobs",
    lines: (stats) => [["known", amount(stats.jobs.total)], ...Object.entries(stats.jobs.byStatus).map(([name, count]) => [name, amount(count)])],
  },
  {
    title: "Server",
    state: (stats) => (stats.draining ? "bad" : ""),
    lines: (stats) => [
      ["version", stats.version],
      ["up", duration(stats.uptime)],
      ["memory", bytes(stats.process.memoryBytes)],
      ["nodes", amount(stats.nodes?.length ?? 1)],
      ...(stats.draining ? [["state", "stopping"]] : []),
    ],
  },
];

function createCard({ title, unit, rate, lines, state }) {
  const list = el("dl");
  const big = el("p", "big");
  const points = [];
  const line = curve();
  const card = el("section", "card", el("h2", "", title));
  if (rate) card.append(big, line.svg);
  card.append(list);
  const cells = [];

  return {
    card,
    draw(stats, before, seconds) {
      if (rate) {
        const value = rate(stats, before, seconds);
        if (value !== undefined) points.push(value);
        if (points.length > POINTS) points.shift();
        write(big, value === undefined ? "–" : `${amount(value)} ${unit}`);
        const most = Math.max(1, ...points);
        line.draw(points.map((point, at) => [at / Math.max(1, points.length - 1), point / most]));
      }
      card.classList.toggle("bad-card", Boolean(state?.(stats)));
      const wanted = lines(stats);
      for (const [at, [words, value, share]] of wanted.entries()) {
        if (!cells[at]) {
          cells[at] = { term: el("dt"), value: el("dd"), fill: el("span", "fill") };
          cells[at].row = el("div", "", cells[at].term, cells[at].value, cells[at].fill);
          list.append(cells[at].row);
        }
        write(cells[at].term, words);
        write(cells[at].value, value);
        cells[at].fill.style.transform = `scaleX(${share ?? 0})`;
      }
      for (const cell of cells.splice(wanted.length)) cell.row.remove();
    },
  };
}

export function createStats() {
  const cards = CARDS.map(createCard);
  $("stats").append(...cards.map(({ card }) => card));
  let me = null;
  let timer = 0;
  let before;
  let at = 0;
  let after = null; // where the shown page of connections begins
  let next = null;
  let busy = false;

  async function look() {
    clearTimeout(timer);
    if (!me?.can("ops") || busy || document.hidden) return;
    busy = true;
    const who = me;
    try {
      const query = new URLSearchParams({ limit: String(PAGE), ...(after && { after }) });
      const [stats, connections] = await Promise.all([call("api/v2/stats"), call(`api/sse/connections?${query}`)]);
      if (who === me) draw(stats, connections);
    } catch (error) {
      if (who === me) fail(error);
    }
    busy = false;
    if (me) timer = setTimeout(look, EVERY_MS);
  }

  function draw(stats, connections) {
    const now = performance.now();
    for (const card of cards) card.draw(stats, before, (now - at) / 1000);
    before = stats;
    at = now;
    next = connections.next;
    $("stats").hidden = $("connections").hidden = false;
    $("stats").classList.remove("stale");
    write($("stats-why"), `As of ${clock(Date.now())}`);
    write($("connections-total"), `${amount(connections.total)} in all`);
    $("connections-first").disabled = after === null;
    $("connections-next").disabled = next === null;
    $("connections-rows").replaceChildren(...connections.connections.map(row));
  }

  function row(one) {
    const cells = [
      one.username ? `${one.userId} (${one.username})` : one.userId,
      one.transport,
      clock(one.connectedAt),
      one.address,
      one.channels.join(", "),
      one.clientId,
    ];
    return el("tr", "", ...cells.map((text) => Object.assign(el("td", "", text), { title: text })));
  }

  function fail(error) {
    if (error.status === 403) {
      $("stats").hidden = $("connections").hidden = true;
      write($("stats-why"), "These numbers need the capability “ops”.");
      me = null;
      return;
    }
    $("stats").classList.add("stale");
    write($("stats-why"), `Not as of now: ${error.message}${before ? `. Shown is what was known ${duration((performance.now() - at) / 1000)} ago.` : ""}`);
  }

  function turn(to) {
    after = to;
    look();
  }

  $("connections-first").addEventListener("click", () => turn(null));
  $("connections-next").addEventListener("click", () => next && turn(next));
  document.addEventListener("visibilitychange", () => me && look());

  return {
    /** Begin to ask; null ends it. */
    show(who) {
      clearTimeout(timer);
      if (who?.userId !== me?.userId) {
        before = undefined;
        after = null;
      }
      me = who;
      if (!who) return;
      const allowed = who.can("ops");
      $("stats").hidden = $("connections").hidden = !allowed || !before;
      write($("stats-why"), allowed ? "Asking the server" : `These numbers need the capability “ops”, which ${who.userId} does not have.`);
      look();
    },
  };
}
