"""A real queue with the dashboard showing its jobs: Celery, BullMQ or RQ, a Redis of its own, and statuswire.

Run: python tools/examples/live.py celery|bullmq|rq [--port 3000]
Needs redis-server; Celery and RQ in this Python, or node and npm for BullMQ. `make example-celery` sees to the rest.
Ctrl-C ends all of it; what it kept goes with it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BULLMQ = ("bullmq@6", "ioredis@5")
# How often a job is put into the queue.
EVERY_S = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description="A queue's jobs, live.")
    parser.add_argument("kind", choices=("celery", "bullmq", "rq"))
    parser.add_argument("--port", type=int, default=3000, help="of statuswire (3000); 0 takes any free one")
    parser.add_argument("--jobs", type=int, default=0, help="end after so many jobs were put into the queue")
    arguments = parser.parse_args()
    processes: list[subprocess.Popen[bytes]] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="statuswire-example-") as directory:
        try:
            _run(arguments.kind, arguments.port, arguments.jobs, Path(directory), processes)
        except KeyboardInterrupt:
            print()
        finally:
            # Workers first, and Redis last: they would complain.
            for process in reversed(processes):
                # Workers of Celery and RQ take the first as a wish to end their job, the second as an order.
                for end in (process.terminate, process.terminate, process.kill):
                    end()
                    try:
                        process.wait(5)
                        break
                    except subprocess.TimeoutExpired:
                        continue
    return 0


def _run(kind: str, port: int, jobs: int, directory: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        redis_port = free.getsockname()[1]
    redis = f"redis://127.0.0.1:{redis_port}"
    environment = os.environ | {"EXAMPLE_REDIS": redis, "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))}

    def start(*command: str) -> None:
        # In a group of its own: Ctrl-C is for all of a group, and they are to end one after the other.
        processes.append(subprocess.Popen(command, cwd=directory, env=environment, process_group=0))

    server = shutil.which("redis-server") or str(Path(sys.prefix) / "bin" / "redis-server")
    options = ("--save", "", "--loglevel", "warning", "--notify-keyspace-events", "Kgh")
    start(server, "--port", str(redis_port), *options)
    _wait_for(redis_port)
    # The result backend of Celery is a database of its own.
    table = f'[queues.example]\nkind = "{kind}"\nurl = "{redis}/{1 if kind == "celery" else 0}"\n'
    (directory / "statuswire.toml").write_text(table)
    start(sys.executable, "-m", "server", "serve", "--store", "memory:", "--port", str(port))
    if kind == "celery":
        start(sys.executable, "-m", "celery", "-A", "celery_example", "worker", "-E", "-c", "2", "-l", "warning")
    elif kind == "rq":
        start(str(Path(sys.executable).with_name("rq")), "worker", "example", "--url", redis, "--quiet")
    else:
        environment["NODE_PATH"] = str(_install_bullmq())
        start("node", str(HERE / "bullmq_example.cjs"), "work")
    print("The dashboard is at the address of the next line that names one. Ctrl-C ends it.", flush=True)
    count = 0
    while not jobs or count < jobs:
        user = random.choice(("alice", "bob", "carol"))
        if kind == "bullmq":
            subprocess.run(["node", str(HERE / "bullmq_example.cjs"), "add", user], env=environment, check=True)
        else:
            subprocess.run([sys.executable, str(HERE / f"{kind}_example.py"), user], env=environment, check=True)
        count += 1
        if any(process.poll() is not None for process in processes):
            raise SystemExit("one of the processes has ended")
        time.sleep(EVERY_S)


def _install_bullmq() -> Path:
    place = Path(sys.prefix) / "example"
    if not (place / "node_modules" / "ioredis").is_dir():
        place.mkdir(exist_ok=True)
        (place / "package.json").write_text('{"private": true}')
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--omit=optional", "--ignore-scripts"]
        subprocess.run([*command, *BULLMQ], cwd=place, check=True)
    return place / "node_modules"


def _wait_for(port: int) -> None:
    give_up = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
