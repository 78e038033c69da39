// ws, and node's own http for events and long-polls.
import { createServer } from "node:http";
import { createServer as listen } from "node:net";
import { parseArgs } from "node:util";
import { WebSocketServer, WebSocket } from "ws";

const { values } = parseArgs({ options: { port: { type: "string" }, feed: { type: "string" } } });
const sockets = new Map(), streams = new Map();
const readers = (map, channel) => map.get(channel) ?? map.set(channel, new Set()).get(channel);

const polls = new Map();
const polled = (channel) => polls.get(channel) ?? polls.set(channel, { last: 0, messages: [], waiting: [] }).get(channel);
const since = (kept, seen) => `{"updates":[${kept.messages.slice(Math.max(0, kept.messages.length - (kept.last - seen)))}],"last_seen":"${kept.last}"}`;

function poll(request, response) {
  const url = new URL(request.url, "http://localhost");
  const kept = polled(url.pathname.split("/").pop()), seen = url.searchParams.get("last_seen");
  const answer = () => {
    const body = since(kept, seen === null ? kept.last : Number(seen));
    response.writeHead(200, { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) }).end(body);
  };
  if (seen === null || Number(seen) < kept.last) answer();
  else kept.waiting.push(answer);
}

const server = createServer((request, response) => {
  if (request.url.startsWith("/poll/")) return poll(request, response);
  const all = readers(streams, request.url.split("/").pop());
  response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-cache" });
  response.write('data: {"type":"snapshot"}\n\n');
  all.add(response);
  response.on("close", () => all.delete(response));
});
const wss = new WebSocketServer({ server, perMessageDeflate: false });
wss.on("connection", (socket, request) => {
  const all = readers(sockets, request.url.split("/").pop());
  all.add(socket);
  socket.on("close", () => all.delete(socket));
  socket.on("error", () => {});
  socket.send('{"type":"subscribed"}');
});
server.listen(Number(values.port), "127.0.0.1", 4096);

listen((feed) => {
  let rest = "";
  feed.setEncoding("utf8").on("data", (data) => {
    const lines = (rest + data).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const [channel, message] = line.split("\t");
      const frame = Buffer.from(message);
      for (const socket of sockets.get(channel) ?? [])
        if (socket.readyState === WebSocket.OPEN) socket.send(frame, { binary: false });
      const all = streams.get(channel);
      if (all?.size) {
        const event = `data: ${message}\n\n`;
        for (const response of all) response.write(event);
      }
      const kept = polled(channel), { waiting } = kept;
      kept.last += 1;
      kept.messages.push(message);
      if (kept.messages.length > 64) kept.messages.shift();
      kept.waiting = [];
      for (const answer of waiting) answer();
    }
  });
  feed.on("error", () => {});
}).listen(Number(values.feed), "127.0.0.1");
