// Real queues for the tests: `node jobs.cjs bullmq|bull4 PORT add|QUEUE [COUNTS]`, modules from NODE_PATH.
// Jobs that kill their worker have a queue of their own, `fragile`, so that they take no others with them.
const [kind, port, what, counts] = process.argv.slice(2);
const connection = { host: "127.0.0.1", port: Number(port), maxRetriesPerRequest: null };
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function run(job) {
  const [name, started] = [job.data.does, job.attemptsMade];
  const report = (value) => (kind === "bullmq" ? job.updateProgress(value) : job.progress(value));
  if (name === "die" && !process.env.STEADY) {
    await sleep(50);
    process.kill(process.pid, "SIGKILL");
  }
  await report(25);
  await sleep(10);
  if (name === "bad" || (name === "flaky" && started === 0)) throw new Error(`${name} went wrong`);
  await report({ percent: 60, message: "half of it", stage: "encode" });
  await sleep(10);
  return { secret: "not for everybody" };
}

async function add() {
  const open = (name) => kind === "bullmq" ? new (require("bullmq").Queue)(name, { connection })
    : new (require("bull"))(name, { redis: connection });
  const [video, fragile] = [open("video"), open("fragile")];
  const removed = [];
  for (const [does, count] of Object.entries(JSON.parse(counts))) {
    const queue = does === "die" ? fragile : video;
    for (let number = 0; number < count; number++) {
      const data = { userId: `user_${number % 3}`, does, file: "private.mov" };
      const options = { jobId: `${does}-${number}` };
      if (does === "flaky") Object.assign(options, { attempts: 2, backoff: { type: "fixed", delay: 30 } });
      if (does === "removed") options.delay = 3600_000;
      const job = kind === "bullmq" ? await queue.add(does, data, options) : await queue.add(data, options);
      if (does === "removed") removed.push(job);
    }
  }
  await sleep(3000);
  for (const job of removed) await job.remove();
}

function work(name) {
  const concurrency = name === "fragile" ? 1 : 4;
  const quick = { lockDuration: 1000, stalledInterval: 500, maxStalledCount: 1 };
  if (kind === "bullmq") {
    new (require("bullmq").Worker)(name, run, { connection, concurrency, ...quick });
  } else {
    const queue = new (require("bull"))(name, { redis: connection, settings: quick });
    queue.process(concurrency, run);
  }
}

if (what === "add") add().then(() => process.exit(0));
else work(what);
