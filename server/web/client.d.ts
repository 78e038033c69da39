// Types of client.js, client.cjs and client.iife.js. What it does is told in docs/client.md.

/** `open`: connected by a push transport. `polling`: asking again and again. In all other states what is known may be old. */
export type State = "connecting" | "open" | "polling" | "offline" | "closed";
export type Transport = "websocket" | "sse" | "longpoll" | "poll";
export type Status = "queued" | "processing" | "completed" | "failed" | "cancelled" | "stalled";

export interface Job {
  jobId: string;
  userId: string;
  kind?: string;
  status: Status;
  /** 0 to 100. */
  progress?: number;
  stage?: string;
  currentOperation?: string;
  message?: string;
  steps?: { done?: number; total?: number; current?: string; failed?: number };
  attempt: number;
  version: number;
  /** Seconds. */
  estimatedTimeRemaining?: number;
  estimatedCompletionTime?: string;
  workerId?: string;
  parentId?: string;
  result?: unknown;
  error?: string;
  metadata?: Record<string, unknown>;
  cancelRequested?: boolean;
  createdAt: string;
  startedAt?: string;
  timestamp: string;
  endedAt?: string;
}

/** A job's record as it comes: the whole of it, and by what. A job that was deleted comes once more as it was last. */
export interface JobUpdate extends Job {
  type: "snapshot" | "status_update" | "job_completed" | "job_failed" | "job_cancelled" | "job_deleted";
}

export interface Notification {
  type: "notification";
  /** For `ack`. */
  id: string;
  event: string;
  data: unknown;
  metadata: Record<string, unknown>;
  timestamp: string;
}

/** A job's id, a user's jobs, notifications (of a channel, too, if one is named), or all jobs one may see. */
export type What = string | { user: string } | { all: true };
export type Channel = { channel: string };

export interface Options {
  /** The server's address; by default where the script came from. */
  url?: string | URL;
  /** Gives a JWT, for as long as it is asked; `refused` says that the last one was not accepted. */
  getToken?: (why: { refused: boolean }) => string | undefined | Promise<string | undefined>;
  /** Which to try, best first. All by default. */
  transports?: Transport[];
  /** Where to go on from: a cursor, or a unix time; without it watching begins with the present state. */
  since?: string | number;
  /** `pause` disconnects while the page is hidden for longer than half a minute. */
  visibility?: "keep" | "pause";
  /** One connection for all tabs of this origin that have the same user. */
  share?: boolean;
  autoReconnect?: boolean;
  /** Failures in a row after which it gives up. No limit by default. */
  maxReconnectAttempts?: number;
  /** Milliseconds: the first wait is a random part of it, each further one of twice as much, up to 20 seconds. */
  reconnectDelay?: number;
  /** Called with all that comes of any job that is watched. */
  onProgress?: (job: JobUpdate) => void;
  onError?: (error: StatusError) => void;
  onConnect?: (client: Client) => void;
  onDisconnect?: (client: Client) => void;
}

export interface Watch<Item> extends AsyncIterable<Item> {
  /** What is known of it now. */
  readonly jobs: Job[];
  /** Whether that is how things are; `false` while there is no connection, and before the first answer. */
  readonly live: boolean;
  close(): void;
}

export interface Watching {
  signal?: AbortSignal;
}

export interface Client {
  readonly state: State;
  /** The one in use, or null while there is none. */
  readonly transport: Transport | null;
  /** Why it is not live, if that is known. */
  readonly error: StatusError | undefined;
  /** Whether what is known is how things are. */
  readonly live: boolean;

  /**
   * Watch something, over the one connection: first what is known of it, then all that comes, each version once and in
   * order. A loop over a single job ends with it; a callback goes on, as a job may be attempted again.
   */
  watch(what: What, options?: Watching): Watch<JobUpdate>;
  watch(what: Channel, options?: Watching): Watch<Notification>;
  watch(what: What, callback: (job: JobUpdate) => void, options?: Watching): Watch<JobUpdate>;
  watch(what: Channel, callback: (notification: Notification) => void, options?: Watching): Watch<Notification>;

  /** The job's record as it is now. */
  snapshot(jobId: string): Promise<Job & { live: true }>;
  /** The job's record when it has ended, however it did. */
  done(jobId: string, options?: Watching): Promise<JobUpdate>;
  /** Ask for the job to be cancelled. */
  cancel(jobId: string): Promise<Job>;
  /** Stored notifications up to this one need not come again. */
  ack(id: string): Promise<void>;

  /** Call a function when `state` changes, or a watch becomes live later than that; returns one that ends it. */
  onState(callback: (client: Client) => void): () => void;
  /** Connect now, as if nothing had ever failed. */
  reconnect(): void;
  /** For good, until `reconnect`. */
  disconnect(): void;
}

export function connect(options?: Options): Client;

export class StatusError extends Error {
  constructor(code: string, message?: string, more?: { status?: number; delay?: number });
  /**
   * The server's own, such as `unauthorized`, `forbidden` or `job_not_found`; or `unreachable`, `timeout`, `blocked` (something
   * on the way does not let it through), `closed`, `offline`, `disconnected`, `denied`, `no_token` (`getToken` has thrown, or
   * given nothing within 15 seconds) or `gave_up`.
   */
  code: string;
  /** Of an HTTP answer. */
  status?: number;
  /** Milliseconds that the server asks to wait. */
  delay?: number;
}
