// What users write has to fit the declared types, and those the sources. Compiled by test_build.py, never run.

import * as declared from "../../server/web/client.js";
import { StatusContext, useJobStatus, useJobs, useNotifications, useTaskProgress } from "../../server/web/react.js";

const client: declared.Client = declared.connect({
  url: "https://example.com/status/",
  getToken: async ({ refused }) => (refused ? "new" : "old"),
  transports: ["websocket", "sse", "longpoll", "poll"],
  since: 1_700_000_000,
  visibility: "pause",
  share: true,
  autoReconnect: true,
  maxReconnectAttempts: 5,
  reconnectDelay: 100,
  onProgress: (job) => job.version + (job.progress ?? 0),
  onError: (error) => error.code.length,
  onConnect: ({ state }) => state === "open",
});

export async function use() {
  for await (const job of client.watch("job-1")) console.log(job.type, job.progress, job.steps?.done);
  for await (const { event, data } of client.watch({ channel: "news" })) console.log(event, data);
  const stop = new AbortController();
  const watch = client.watch({ user: "alice" }, (job) => console.log(job.jobId), { signal: stop.signal });
  console.log(watch.live, watch.jobs.length, client.watch({ all: true }).jobs);
  watch.close();
  const { live, status } = await client.snapshot("job-1");
  const ended: declared.Job = await client.done("job-1", { signal: stop.signal });
  const asked: boolean | undefined = (await client.cancel("job-1")).cancelRequested;
  const off = client.onState(({ state, transport, error }) => console.log(state, transport, error?.code));
  off();
  await client.ack("epoch:1");
  client.reconnect();
  client.disconnect();
  return [live, status, ended, asked];
}

export function Component() {
  const { job, live, state } = useJobStatus("job-1");
  const { jobs } = useJobs({ user: "alice" });
  const { notifications } = useNotifications({ userId: "alice", channels: ["news"] });
  const { progress, error, isConnected, connection, reconnect, disconnect } = useTaskProgress("task-1", {
    autoReconnect: false,
    onProgress: ({ taskId, results }) => console.log(taskId, results),
    onConnect: () => console.log("connected"),
  });
  return [job?.status, live, state, jobs.length, notifications[0]?.event, progress?.status, error, isConnected, connection, reconnect, disconnect, StatusContext];
}

// @ts-expect-error - no such transport
declared.connect({ transports: ["carrier pigeon"] });
// @ts-expect-error - nothing of the kind can be watched
client.watch({ planet: "mars" });
