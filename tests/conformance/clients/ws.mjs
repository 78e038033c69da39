// The package ws: node ws.mjs PACKAGES PLAN OPTIONS, the last two as JSON.
import { createRequire } from "node:module";

import { converse } from "./conversation.mjs";

const [packages, plan, options] = process.argv.slice(2);
const { WebSocket } = createRequire(`${packages}/`)("ws");

function fragments(socket, texts) {
  for (const text of texts) socket.send(text, { fin: false });
  socket.send("", { fin: true });
}

const ping = (socket, payload) =>
  new Promise((resolve) => {
    socket.once("pong", (data) => resolve(data.toString()));
    socket.ping(payload);
  });

const make = (url) => new WebSocket(url, JSON.parse(options));
console.log(JSON.stringify(await converse(make, JSON.parse(plan), { fragments, ping })));
