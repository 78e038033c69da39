// Types of react.js. See docs/client.md.

import type { Context } from "react";
import type { Client, Job, JobUpdate, Notification, Options, State, StatusError, Transport } from "./client.js";

/** The client that the hooks below it use; without one they share one of their own. */
export const StatusContext: Context<Client | undefined>;

export interface Connection {
  /** Whether what is given here is how things are. */
  live: boolean;
  state: State;
  transport?: Transport | null;
  error?: StatusError;
}

export function useJobStatus(jobId: string | null | undefined): Connection & { job: JobUpdate | undefined };

/** All jobs one may see, or those of a user. */
export function useJobs(what?: { user?: string }): Connection & { jobs: Job[] };

/** The newest hundred of those that reach this connection: for its user, for all, and of the channels. */
export function useNotifications(options?: {
  userId?: string;
  channels?: string[];
}): Connection & { notifications: Notification[] };

export interface TaskProgress extends Omit<Job, "jobId" | "status" | "result"> {
  taskId: string;
  status: "pending" | "running" | "completed" | "failed";
  results?: unknown;
}

export interface TaskOptions extends Omit<Options, "onProgress" | "onConnect" | "onDisconnect"> {
  onProgress?: (progress: TaskProgress) => void;
  onConnect?: () => void;
  onDisconnect?: () => void;
}

/** With options for the connection it has one of its own. */
export function useTaskProgress(
  taskId: string | null | undefined,
  options?: TaskOptions,
): {
  progress: TaskProgress | undefined;
  error: string | undefined;
  isConnected: boolean;
  connection: State;
  reconnect(): void;
  disconnect(): void;
};
