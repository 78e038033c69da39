// A page of React whose hooks are given now this and now that to watch, and are taken away and put back. The import map
// is that of test_components.py.

import { StrictMode, createElement } from "react";
import { createRoot } from "react-dom/client";
import { connect } from "statuswire-client";
import { StatusContext, useJobStatus, useJobs, useNotifications, useTaskProgress } from "statuswire-react";

const show = (id, ...texts) => createElement("p", { id, key: id }, texts.join(" "));

function Watching({ user, reader, id }) {
  const { jobs } = useJobs({ user });
  const { notifications } = useNotifications({ userId: reader, channels: ["news"] });
  const { job, live } = useJobStatus(id);
  return [
    show("jobs", jobs.map(({ jobId }) => jobId).sort()),
    show("news", notifications.map(({ data }) => data)),
    show("job", job?.progress, live),
  ];
}

function Own({ transports }) {
  const task = useTaskProgress("hers", { transports });
  globalThis.task = task;
  return show("own", task.progress?.progress, task.isConnected, task.connection);
}

const client = (globalThis.client = connect({ transports: ["sse"] }));
const root = createRoot(document.getElementById("root"));
globalThis.render = ({ own, ...given }) => {
  const parts = [given.user && createElement(Watching, { key: "watching", ...given }), own && createElement(Own, { key: "own", transports: own })];
  root.render(createElement(StrictMode, null, createElement(StatusContext.Provider, { value: client }, parts)));
};
globalThis.ready = true;
