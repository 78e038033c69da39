// socket.io: its rooms, over WebSocket.
import { createServer } from "node:http";
import { createServer as listen } from "node:net";
import { parseArgs } from "node:util";
import { Server } from "socket.io";

const { values } = parseArgs({ options: { port: { type: "string" }, feed: { type: "string" } } });
const server = createServer();
// Its pings are messages of its own kind, which the load client does not answer.
const io = new Server(server, { transports: ["websocket"], serveClient: false, pingInterval: 300000 });
io.on("connection", (socket) => {
  socket.join(socket.handshake.query.channel);
  socket.emit("message", { type: "subscribed" });
});
server.listen(Number(values.port), "127.0.0.1", 4096);

listen((feed) => {
  let rest = "";
  feed.setEncoding("utf8").on("data", (data) => {
    const lines = (rest + data).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const [channel, message] = line.split("\t");
      io.to(channel).emit("message", JSON.parse(message));
    }
  });
  feed.on("error", () => {});
}).listen(Number(values.feed), "127.0.0.1");
