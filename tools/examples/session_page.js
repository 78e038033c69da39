// The jobs of whoever has logged in, with live bars: the page of both applications with sessions, FastAPI and Django.

import { connect } from "statuswire/client.js";
import "statuswire/job-progress.js";

// No token: the browser sends the session's cookie by itself, as statuswire is on the same host.
const client = connect();
const rows = new Map();

function rowOf({ jobId }) {
  if (!rows.has(jobId)) {
    const row = document.getElementById("row").content.firstElementChild.cloneNode(true);
    row.querySelector("strong").textContent = jobId;
    const bar = row.querySelector("job-progress");
    bar.client = client;
    bar.setAttribute("job", jobId);
    rows.set(jobId, row);
    document.getElementById("jobs").prepend(row);
  }
  return rows.get(jobId);
}

// All that one may see: the user's own, which is for the server to decide and not for the page.
client.watch({ all: true }, (job) => {
  const ended = ["completed", "failed", "cancelled"].includes(job.status);
  const row = rowOf(job);
  row.dataset.status = job.status;
  row.querySelector(".says").textContent = [ended || !job.message ? job.status : "", job.error ?? job.message].filter(Boolean).join(": ");
});

const SAYS = {
  connecting: "Connecting…",
  open: "Live",
  polling: "Live, by asking every two seconds",
  offline: "Not live: the server cannot be reached. Trying again…",
  closed: "Not live",
};
let wasLive = false;
client.onState(() => {
  document.getElementById("state").textContent = SAYS[client.state];
  // The server has ended it: somebody logged out, in another tab maybe. The application knows what to show now.
  if (client.state === "closed" && wasLive) location.reload();
  wasLive ||= client.live;
});
