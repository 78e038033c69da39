// A page of React in strict mode that shows all that the hooks give. Bundled with React by test_components.py.

import { StrictMode, createElement } from "react";
import { createRoot } from "react-dom/client";
import { useJobStatus, useJobs, useNotifications, useTaskProgress } from "statuswire-react";

const texts = (globalThis.texts = {}); // by name, every one that was rendered
const show = (name, text) => {
  if ((texts[name] ??= []).at(-1) !== text) texts[name].push(text);
  return createElement("p", { id: name }, text);
};

function Job({ id }) {
  const { job, live, state } = useJobStatus(id);
  return show("job", `${job?.version ?? "-"} ${job?.progress ?? "-"} ${live} ${state}`);
}

function Jobs() {
  const { jobs, live } = useJobs();
  return show("jobs", `${jobs.map((job) => job.jobId).sort()} ${live}`);
}

function News({ channel }) {
  const { notifications } = useNotifications({ userId: "anonymous", channels: [channel] });
  return show("news", notifications.map((one) => one.data).join());
}

function Task({ id }) {
  const task = useTaskProgress(id, { onProgress: ({ status }) => (texts.told ??= []).push(status) });
  globalThis.task = task;
  return show("task", `${task.progress?.status ?? "-"} ${task.isConnected} ${task.connection} ${task.error ?? "-"}`);
}

export function App({ id = "job-1" }) {
  return createElement(
    StrictMode,
    null,
    createElement(Job, { id }),
    createElement(Jobs),
    createElement(News, { channel: "news" }),
    createElement(Task, { id }),
  );
}

if (globalThis.document) {
  const root = createRoot(document.getElementById("root"));
  root.render(createElement(App));
  globalThis.showJob = (id) => root.render(createElement(App, { id }));
  globalThis.unmount = () => root.unmount();
}
