// The transports as they are, without the client: to be looked at, not to be relied on. Each of them is
//   open(jobIds, tell, ended) -> stop
// with `tell(way, text)` for what is sent (">") and comes ("<"), and `ended(why)` at most once.

import { address, authorization, token } from "./session.js";

const POLL_S = 25;
const PAUSE_MS = 2000; // between two polls that do not wait
// Longer ones are cut by whoever shows them; this is for what has no end.
const LONGEST_EVENT = 1_000_000;

function query(path, parameters) {
  const url = address(path);
  for (const [name, value] of Object.entries(parameters)) if (value) url.searchParams.set(name, value);
  return url;
}

const shown = (url) => url.pathname + decodeURIComponent(url.search);

function openWebSocket(jobIds, tell, ended) {
  const url = address("ws/jobs");
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url, ["statuswire.v1"]);
  const send = (message, said = message) => {
    socket.send(JSON.stringify(message));
    tell(">", JSON.stringify(said));
  };
  tell(">", `GET ${url.pathname}, Upgrade: websocket`);
  socket.onopen = () => {
    // Who looks over one's shoulder must not see it.
    if (token()) send({ type: "auth", token: token() }, { type: "auth", token: "…" });
  };
  socket.onmessage = ({ data }) => {
    tell("<", data);
    if (JSON.parse(data).type === "connected") send({ type: "subscribe", ...(jobIds.length && { jobIds }) });
  };
  socket.onclose = ({ code, reason }) => ended(`closed: ${code} ${reason}`);
  return () => {
    socket.onclose = socket.onmessage = null;
    socket.close();
  };
}

// Runs until it throws or is stopped.
function openLoop(run) {
  return (jobIds, tell, ended) => {
    const controller = new AbortController();
    const guarded = (way, text) => controller.signal.aborted || tell(way, text);
    run(jobIds, guarded, controller.signal).then(
      (why) => controller.signal.aborted || ended(why),
      (error) => controller.signal.aborted || ended(`failed: ${error.message}`),
    );
    return () => controller.abort();
  };
}

async function stream(jobIds, tell, signal) {
  const url = query("api/v2/jobs/stream", { jobIds: jobIds.join(",") });
  tell(">", `GET ${shown(url)}`);
  const answer = await fetch(url, { headers: { Accept: "text/event-stream", ...authorization() }, signal, cache: "no-store" });
  tell("<", `${answer.status} ${answer.headers.get("content-type") ?? ""}`);
  if (!answer.body) return "ended";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += value ?? "";
    const events = rest.split("\n\n");
    rest = events.pop().slice(-LONGEST_EVENT);
    for (const event of events) tell("<", event);
    if (done) {
      if (rest) tell("<", rest);
      return "ended";
    }
  }
}

async function poll(jobIds, tell, signal, timeout) {
  let cursor = "";
  for (;;) {
    const url = query("api/v2/jobs/poll", { jobIds: jobIds.join(","), timeout: String(timeout), last_seen: cursor });
    tell(">", `GET ${shown(url)}`);
    const answer = await fetch(url, { headers: authorization(), signal, cache: "no-store" });
    const text = await answer.text();
    tell("<", `${answer.status} ${text}`);
    if (!answer.ok) return "stopped: it was refused";
    const { last_seen: seen, done } = JSON.parse(text);
    if (done) return "ended: all of these jobs have";
    cursor = seen;
    if (!timeout) await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
}

export const WIRES = [
  { name: "WebSocket", note: "frames", open: openWebSocket },
  { name: "SSE", note: "events", open: openLoop(stream) },
  { name: "Long-poll", note: "requests", open: openLoop((...given) => poll(...given, POLL_S)) },
  { name: "Polling", note: "requests", open: openLoop((...given) => poll(...given, 0)) },
];
