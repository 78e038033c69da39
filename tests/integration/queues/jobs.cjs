// Real queues for the tests: `node jobs.cjs bullmq|bullmq5|bull PORT add|QUEUE [COUNTS]`, modules from NODE_PATH.
// Jobs that kill their worker have a queue of their own, `fragile`, so that they take no others with them.
const [kind, port, what, counts] = process.argv.slice(2);
const library = require(kind);
const connection = { host: "127.0.0.1", port: Number(port), maxRetriesPerRequest: null };
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const old = kind === "bull";

async function run(job) {
  const [name, started] = [job.data.does, job.attemptsMade];
  const report = (value) => (old ? job.progress(value) : job.updateProgress(value));
  if (name === "die" && !process.env.STEADY) {
    await sleep(50);
    process.kill(process.pid, "SIGKILL");
  }
  await report(25);
  await sleep(80);
  if (name === "bad" || (name === "flaky" && started === 0)) throw new Error(`${name} went wrong`);
  await report({ percent: 60, message: "half of it", stage: "encode" });
  await sleep(80);
  return { secret: "not for everybody" };
}

async function add() {
  const open = (name) => old ? new library(name, { redis: connection }) : new library.Queue(name, { connection });
  const [video, fragile] = [open("video"), open("fragile")];
  const removed = [];
  for (const [does, count] of Object.entries(JSON.parse(counts))) {
    const queue = does === "die" ? fragile : video;
    for (let number = 0; number < count; number++) {
      const data = { userId: `user_${number % 3}`, does, file: "private.mov" };
      const options = { jobId: `${does}-${number}` };
      if (does === "flaky") Object.assign(options, { attempts: 2, backoff: { type: "fixed", delay: 200 } });
      if (does === "removed") options.delay = 3600_000;
      if (does === "flow") await addFlow(options.jobId, data);
      else {
        const job = old ? await queue.add(data, options) : await queue.add(does, data, options);
        if (does === "removed") removed.push(job);
      }
    }
  }
  await sleep(1500);
  for (const job of removed) await job.remove();
}

// A job that waits for three others.
async function addFlow(jobId, data) {
  const flows = new library.FlowProducer({ connection });
  const one = (id, does) => ({ name: does, queueName: "video", data: { ...data, does }, opts: { jobId: id } });
  await flows.add({ ...one(jobId, "flow"), children: [0, 1, 2].map((n) => one(`${jobId}-part-${n}`, "part")) });
  await flows.close();
}

function work(name) {
  const fragile = name === "fragile";
  const concurrency = fragile ? 1 : 8;
  // On a slow machine a lock must not run out by itself.
  const quick = { lockDuration: fragile ? 1000 : 8000, stalledInterval: fragile ? 500 : 2000, maxStalledCount: 5 };
  if (old) {
    const queue = new library(name, { redis: connection, settings: quick });
    queue.process(concurrency, run);
    queue.on("error", () => {});
  } else {
    new library.Worker(name, run, { connection, concurrency, ...quick }).on("error", () => {});
  }
}

if (what === "add") add().then(() => process.exit(0));
else work(what);
