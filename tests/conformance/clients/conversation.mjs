// What every WebSocket client does, over an adapter with the interface of browsers. Says what it was given.
//
// plan: {echo, jobs, refused, texts, binary, beats}. extras: {fragments, ping} where the client can do so.

function opened(make, url) {
  const heard = [];
  const waiting = [];
  const socket = make(url);
  socket.binaryType = "arraybuffer";
  const tell = (event) => (waiting.length ? waiting.shift()(event) : heard.push(event));
  socket.onmessage = ({ data }) => tell(data);
  const closed = new Promise((resolve) => {
    socket.onclose = ({ code, reason }) => resolve([code, reason]);
  });
  const open = new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error("never opened"));
  });
  const next = () => (heard.length ? Promise.resolve(heard.shift()) : new Promise((resolve) => waiting.push(resolve)));
  return { socket, open, closed, next };
}

export async function converse(make, plan, extras = {}) {
  const said = { texts: [] };
  const echo = opened(make, plan.echo);
  await echo.open;
  said.extensions = echo.socket.extensions;
  for (const text of plan.texts) {
    echo.socket.send(text);
    said.texts.push(await echo.next());
  }
  echo.socket.send(Uint8Array.from(plan.binary));
  said.binary = Array.from(new Uint8Array(await echo.next()));
  if (extras.fragments) {
    extras.fragments(echo.socket, plan.texts);
    said.fragments = await echo.next();
  }
  if (extras.ping) said.pong = await extras.ping(echo.socket, "are you there");
  echo.socket.close(3456, "enough");
  said.closed = await echo.closed;

  const jobs = opened(make, plan.jobs);
  await jobs.open;
  const types = [];
  const until = async (type) => {
    for (;;) {
      const message = JSON.parse(await jobs.next());
      if (types.at(-1) !== message.type) types.push(message.type);
      if (message.type === type) return message;
    }
  };
  said.clientId = (await until("connected")).clientId;
  jobs.socket.send(JSON.stringify({ type: "subscribe", jobIds: ["early"] }));
  said.snapshot = (await until("subscribed")).snapshot.length;
  for (let beats = 0; beats < plan.beats; beats++) await until("heartbeat");
  jobs.socket.send(JSON.stringify({ type: "subscribe", jobIds: ["late"] }));
  await until("subscribed");
  said.ending = (await until("job_completed")).message;
  said.types = types;
  jobs.socket.send(JSON.stringify({ type: "subscribe", jobIds: ["over"] }));
  said.disconnected = await jobs.closed;

  const refused = opened(make, plan.refused);
  await refused.open;
  said.refused = (await refused.closed)[0];
  return said;
}
