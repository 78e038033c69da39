// ws, and node's own http for events.
import { createServer } from "node:http";
import { createServer as listen } from "node:net";
import { parseArgs } from "node:util";
import { WebSocketServer, WebSocket } from "ws";

const { values } = parseArgs({ options: { port: { type: "string" }, feed: { type: "string" } } });
const sockets = new Map(), streams = new Map();
const readers = (map, channel) => map.get(channel) ?? map.set(channel, new Set()).get(channel);

const server = createServer((request, response) => {
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
    }
  });
  feed.on("error", () => {});
}).listen(Number(values.feed), "127.0.0.1");
