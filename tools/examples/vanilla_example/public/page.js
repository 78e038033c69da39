// A list of jobs with live bars, without a framework and without a build.

import { connect } from "statuswire/client.js";
import "statuswire/job-progress.js";

// One connection for all of the page. It chooses the transport, comes back by itself, and says when it is not live.
const client = connect();
const list = document.getElementById("jobs");
const template = document.getElementById("row").content.firstElementChild;
const rows = new Map(); // by job id

function rowOf({ jobId }) {
  if (!rows.has(jobId)) {
    const row = template.cloneNode(true);
    row.querySelector("strong").textContent = jobId;
    const bar = row.querySelector("job-progress");
    bar.client = client; // else bars have a connection of their own
    bar.setAttribute("job", jobId);
    // The worker learns of it with its next report; what becomes of it comes the same way as everything else.
    row.querySelector("button").onclick = () => client.cancel(jobId).catch(complain);
    rows.set(jobId, row);
    list.prepend(row);
  }
  return rows.get(jobId);
}

// First all jobs as they are now, then every change, each once and in order; a page that is loaded again has it all again.
client.watch({ all: true }, (job) => {
  const row = rowOf(job);
  if (job.type === "job_deleted") {
    row.remove();
    rows.delete(job.jobId);
    return;
  }
  const ended = ["completed", "failed", "cancelled"].includes(job.status);
  // textContent, never innerHTML: what workers say is text.
  row.querySelector(".says").textContent = [ended || !job.message ? job.status : "", job.error ?? job.message].filter(Boolean).join(": ");
  row.querySelector("button").disabled = ended || Boolean(job.cancelRequested);
  row.dataset.status = job.status;
});

const state = document.getElementById("state");
const SAYS = {
  connecting: "Connecting…",
  open: "Live",
  polling: "Live, by asking every two seconds",
  offline: "Not live: the server cannot be reached. Trying again…",
  closed: "Not live",
};
client.onState(() => (state.textContent = SAYS[client.state]));

function complain(error) {
  state.textContent = String(error.message);
}

document.getElementById("start").onsubmit = async (event) => {
  event.preventDefault();
  const pages = event.target.elements.pages.valueAsNumber;
  // Work is asked of the application, not of statuswire, which only tells how it goes.
  const answer = await fetch("exports", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ pages }),
  });
  if (!answer.ok) complain(new Error(`The application answered ${answer.status}`));
};
