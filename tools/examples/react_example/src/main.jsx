// A list of jobs with live bars. The hooks render at most once per frame, however fast updates come.

import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { connect } from "statuswire/client.js";
import { StatusContext, useJobs } from "statuswire/react.js";
import "./page.css";

// One connection for all hooks. By itself the client looks for the server where its script came from, which is true of a
// script that the server has sent, and not of one in a bundle.
const client = connect({ url: "/status/" });

const SAYS = {
  connecting: "Connecting…",
  open: "Live",
  polling: "Live, by asking every two seconds",
  offline: "Not live: the server cannot be reached. Trying again…",
  closed: "Not live",
};
const ENDED = ["completed", "failed", "cancelled"];

function Exports() {
  // Of a plain user these are the user's own: that is for the server to decide.
  const { jobs, live, state } = useJobs();
  const [problem, setProblem] = useState("");
  const complain = (error) => setProblem(error.message);
  const newestFirst = jobs.toSorted((one, other) => other.createdAt.localeCompare(one.createdAt));

  // Work is asked of the application, not of statuswire, which only tells how it goes.
  async function start(form) {
    setProblem("");
    const answer = await fetch("/exports", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ pages: Number(form.get("pages")) }),
    });
    if (!answer.ok) setProblem(`The application answered ${answer.status}`);
  }

  return (
    <>
      <h1>Exports</h1>
      <form id="start" action={start}>
        <label>
          Pages <input name="pages" type="number" defaultValue="40" min="1" max="500" required />
        </label>{" "}
        <button>Start an export</button>
      </form>
      <p id="state" role="status">
        {problem || SAYS[state]}
      </p>
      <ul id="jobs" className={live ? "" : "stale"}>
        {newestFirst.map((job) => (
          <Export key={job.jobId} job={job} onCancel={() => client.cancel(job.jobId).catch(complain)} />
        ))}
      </ul>
    </>
  );
}

function Export({ job, onCancel }) {
  const ended = ENDED.includes(job.status);
  const says = job.error ?? job.message;
  return (
    <li data-status={job.status}>
      <strong>{job.jobId}</strong>
      {ended ? <span /> : <button onClick={onCancel} disabled={job.cancelRequested}>Cancel</button>}
      {/* Without a value it is a bar that moves without end: nobody has reported a progress yet. */}
      <progress max="100" value={job.progress} aria-label={`Progress of ${job.jobId}`} />
      <span>{Math.floor(job.progress ?? 0)} %</span>
      <span className="says">{says ? (ended ? `${job.status}: ${says}` : says) : job.status}</span>
    </li>
  );
}

createRoot(document.getElementById("root")).render(
  <StrictMode>
    <StatusContext.Provider value={client}>
      <Exports />
    </StatusContext.Provider>
  </StrictMode>,
);
