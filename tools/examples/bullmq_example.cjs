// A queue of BullMQ as it might be: nothing in here knows of statuswire.
const { Queue, Worker } = require("bullmq");

const url = new URL(process.env.EXAMPLE_REDIS);
const connection = { host: url.hostname, port: Number(url.port), maxRetriesPerRequest: null };
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function encode(job) {
  for (let percent = 0; percent < 100; percent += 4 + Math.floor(Math.random() * 8)) {
    await job.updateProgress({ percent, message: `Encoding ${percent} %`, stage: percent < 50 ? "pass 1" : "pass 2" });
    await sleep(100 + Math.random() * 400);
    if (Math.random() < 0.02) throw new Error("ffmpeg exited with code 1");
  }
  return { url: "/out/1.mp4" };
}

async function add(userId) {
  const queue = new Queue("video", { connection });
  await queue.add("encode", { userId, file: "a.mov" }, { attempts: 2, backoff: { type: "fixed", delay: 2000 } });
  await queue.close();
}

if (process.argv[2] === "add") add(process.argv[3]);
else new Worker("video", encode, { connection, concurrency: 2 });
