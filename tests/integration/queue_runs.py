"""Loads of real jobs in real queues: who works on them, what must become of each, and what readers saw of it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.fleet import Reader
from tests.integration.processes import Process, Start
from tests.redis_servers import RedisServer
from tests.support import until

HERE = Path(__file__).parent / "queues"
# What jobs carry, and nobody may see.
SECRETS = ("private.mov", "not for everybody", "Traceback", ".cjs", "celery_tasks.py", "rq_jobs.py")
LONG_S = 180.0  # on a machine that others use too
LETTERS = {
    "queued": "Q", "processing": "P", "stalled": "S", "completed": "C", "failed": "F", "cancelled": "X",
}  # fmt: skip


@dataclass
class Load:
    """Jobs, and who works on them.

    Attributes:
        tables: what is configured for it.
        send: put all jobs into the queue; each job's id here with what it does and whose it is. Blocks.
        workers: start each of the workers; the argument says how often it was started before.
        truth: what the queue itself says of a job, by its id here, as a status; None if it says nothing of its end.
        exact: that every step of a job is seen, as the queue keeps them, or tells them all.
        announced: that a job is heard of before a worker has it.
        sampled: that only what is can be read, so that what was over by then is missed.
        taken_away: whether the queue gave a job to another worker, by its id here, because the first one was starved
            until its lock had run out.
        nameless: jobs that do this may end without a word of whose they are.
        forgotten: jobs that do this may be left waiting by the queue itself.
        deaf: that its workers have to be started anew when their Redis was.
        running: the workers, once they are kept up.
    """

    tables: dict[str, Any]
    send: Callable[[], dict[str, tuple[str, str]]]
    workers: list[Callable[[int], Process]]
    truth: Callable[[str, str], str | None]
    exact: bool
    announced: bool = True
    sampled: bool = False
    taken_away: Callable[[str], bool] = lambda job_id: False
    nameless: frozenset[str] = frozenset()
    forgotten: frozenset[str] = frozenset()
    deaf: bool = False
    running: list[Process] = field(default_factory=list)


# Bull and BullMQ


BULL = {"ok": 132, "bad": 16, "flaky": 16, "removed": 8, "die": 2, "flow": 6}


def npm_modules() -> Path:
    """Where BullMQ and Bull are, installed as the lock file says."""
    place = Path(sys.prefix) / "queues"
    place.mkdir(exist_ok=True)
    lock = (HERE / "package-lock.json").read_bytes()
    done = place / "installed-lock.json"
    with (place / "busy").open("w") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)  # tests run side by side
        if done.is_file() and done.read_bytes() == lock:
            return place / "node_modules"
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, place)
        # Not `npm ci`: it wants native variants for all systems in the lock file, of what is not even installed.
        command = ["npm", "install", "--no-save", "--omit=optional", "--silent", "--no-audit", "--ignore-scripts"]
        subprocess.run(command, cwd=place, check=True, timeout=300)
        done.write_bytes(lock)
    return place / "node_modules"


def bull_load(redis: RedisServer, start: Start, library: str) -> Load:
    """Of ``bull``, ``bullmq`` or ``bullmq5``, the npm packages."""
    script = ("node", str(HERE / "jobs.cjs"), library, str(redis.port))
    modules = str(npm_modules())
    counts, old = dict(BULL), library == "bull"
    if old:
        counts["ok"] += 4 * counts.pop("flow")
    names: dict[str, tuple[str, str]] = {}
    for does, count in counts.items():
        for number in range(count):
            queue, user = "fragile" if does == "die" else "video", f"user_{number % 3}"
            names[f"{queue}:{does}-{number}"] = (does, user)
            if does == "flow":
                names |= {f"{queue}:flow-{number}-part-{part}": ("ok", user) for part in range(3)}

    def send() -> dict[str, tuple[str, str]]:
        adding = start(*script, "add", json.dumps(counts), NODE_PATH=modules)
        assert adding.wait(LONG_S) == 0
        return names

    def work(queue: str, times: int) -> Process:
        # The first two die of their jobs; after that it keeps out of harm's way.
        steady = {"STEADY": "1"} if times >= counts["die"] else {}
        return start(*script, queue, NODE_PATH=modules, **steady)

    def truth(job_id: str, does: str) -> str | None:
        queue, _, job = job_id.partition(":")
        with redis.oracle() as oracle:
            if oracle.zscore(f"bull:{queue}:completed", job) is not None:
                return "completed"
            if oracle.zscore(f"bull:{queue}:failed", job) is not None:
                return "failed"
            return None if oracle.exists(f"bull:{queue}:{job}") else "cancelled"

    def taken_away(job_id: str) -> bool:
        queue, _, job = job_id.partition(":")
        with redis.oracle() as oracle:
            return int(oracle.hget(f"bull:{queue}:{job}", "stc") or 0) > 0

    # Of Bull's jobs that wait for their time it is only looked up that they do. Whose a job is stands in its hash,
    # which goes when it is removed: on a fast machine before the queue is found.
    return Load(
        {"queues.q": {"kind": "bull4" if old else "bullmq", "url": redis.url}},
        send, [partial(work, "video"), partial(work, "fragile")], truth, exact=not old, sampled=old,
        taken_away=taken_away, nameless=frozenset(("removed",)),
    )  # fmt: skip


# Celery


CELERY = {
    "slow": 3, "orphan": 1, "die": 2, "removed": 6, "flaky": 18, "bad": 18, "chain": 5, "group": 5, "chord": 3,
    "ok": 110,
}  # fmt: skip
_CELERY_ENDS = {"SUCCESS": "completed", "FAILURE": "failed", "REVOKED": "cancelled"}


def celery_load(redis: RedisServer, start: Start, *, events: bool) -> Load:
    """Of Celery, its workers with ``-E`` or without."""
    command = (
        sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "-l", "warning",
        *(["-E"] if events else []), "--without-mingle", "--without-gossip",
    )  # fmt: skip

    def work(queue: str, times: int) -> Process:
        more = ("-c", "6") if queue == "celery" else ("-c", "1")
        return start(*command, *more, "-Q", queue, "-n", f"{queue}-{times}@here", CELERY_REDIS=redis.url)

    def truth(job_id: str, does: str) -> str | None:
        with redis.oracle(db=1) as oracle:
            kept = oracle.get(f"celery-task-meta-{job_id}")
        return None if kept is None else _CELERY_ENDS.get(json.loads(kept)["status"])

    return Load(
        {"queues.q": {"kind": "celery", "url": f"{redis.url}/1", "stalled_after": 8.0}},
        partial(_send, f"celery_tasks.send({CELERY!r})", CELERY_REDIS=redis.url),
        [partial(work, "celery"), partial(work, "fragile")],
        truth, exact=False, announced=events, nameless=frozenset() if events else frozenset(("removed",)),
        deaf=True,
    )  # fmt: skip


# RQ


RQ = {"slow": 2, "orphan": 1, "die": 4, "removed": 15, "flaky": 15, "bad": 15, "child": 12, "ok": 124}
_RQ_ENDS = {"finished": "completed", "failed": "failed", "stopped": "cancelled", "canceled": "cancelled"}


def rq_two() -> str:
    """Where RQ 2 is, beside the one that is installed."""
    place = Path(sys.prefix) / "queues" / "rq2"
    place.parent.mkdir(exist_ok=True)
    with (place.parent / "rq2-busy").open("w") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        if not (place / "rq").is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), "rq<3"]
            subprocess.run(command, check=True, timeout=300)
    return str(place)


def rq_load(redis: RedisServer, start: Start, *, two: bool) -> Load:
    """Of RQ 3, or of RQ 2."""
    path = os.pathsep.join([*([rq_two()] if two else []), str(HERE)])
    main = "import sys; from rq.cli import main; sys.argv[0] = 'rq'; main()"

    def work(queue: str, times: int) -> Process:
        return start(sys.executable, "-c", main, "worker", queue, "--url", redis.url, "--quiet", PYTHONPATH=path)

    def truth(job_id: str, does: str) -> str | None:
        with redis.oracle() as oracle:
            word = oracle.hget(f"rq:job:{job_id}", "status")
        return _RQ_ENDS.get((word or b"").decode())

    return Load(
        {"queues.q": {"kind": "rq", "url": redis.url, "stalled_after": 4.0}},
        partial(_send, f"rq_jobs.send({redis.url!r}, {RQ!r})", PYTHONPATH=path),
        [partial(work, "video")] * 4 + [partial(work, "fragile")],
        # RQ 3 now and then leaves one of several jobs that waited for others ``ready_to_enqueue``.
        truth, exact=False, sampled=True, forgotten=frozenset(("child",)),
    )  # fmt: skip


def _send(call: str, **environment: str) -> dict[str, tuple[str, str]]:
    module = call.partition(".")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"import json, os, {module}; print(json.dumps({call}), flush=True); os._exit(0)"],
        env=os.environ | {"PYTHONPATH": str(HERE)} | environment, stdout=subprocess.PIPE, check=True, timeout=LONG_S,
    )  # fmt: skip
    return {name: (does, user) for name, (does, user) in json.loads(done.stdout).items()}


# Processes


async def keep_up(load: Load) -> None:
    """Workers that end come again, as supervisors see to it."""
    times = [0] * len(load.workers)
    load.running = [work(0) for work in load.workers]
    while True:
        await until(lambda: any(process.poll() is not None for process in load.running), within=math.inf)
        for number, process in enumerate(load.running):
            if process.poll() is not None:
                times[number] += 1
                load.running[number] = load.workers[number](times[number])


# What is seen


@dataclass
class Watcher(Reader):
    """A reader that remembers what it was given of each job."""

    seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def _take(self, message: dict[str, Any], cursor: str) -> None:
        super()._take(message, cursor)
        self.seen.setdefault(message["jobId"], []).append(message)

    def check_order(self, *, shared: Collection[str]) -> None:
        """Every update once, in order, of its own jobs; within an attempt progress never went back.

        Args:
            shared: jobs at which two workers may have been at once: that of the attempt before went on without its
                lock, and the queue says what both report.
        """
        assert not self.resets, self.transport
        assert self.offsets == sorted(set(self.offsets)), self.transport
        for job_id, messages in self.seen.items():
            assert [message["version"] for message in messages] == list(range(1, len(messages) + 1)), job_id
            assert {message["userId"] for message in messages} == {self.user}, job_id
            far = [(message["attempt"], message["progress"]) for message in messages]
            far = [(attempt, progress) for attempt, progress in far if attempt == 1 or job_id not in shared]
            assert far == sorted(far), (job_id, far)


def steps(messages: list[dict[str, Any]]) -> str:
    """The statuses a job went through, a letter for each, once in a row.

    A worker that got no turn for so long that it was believed dead, and then went on, was at it all the time.
    """
    path = re.sub(r"S+(?=[PCX])", "", "".join(LETTERS[message["status"]] for message in messages))
    return re.sub(r"(.)\1+", r"\1", path)


# Of a job that does this, where nothing is missed. What may come several times depends on how slow the machine is.
PATHS = {
    "ok": "QPC", "flow": "QPC", "child": "QPC", "bad": "QPF", "flaky": "QPQPC", "removed": "QX", "slow": "QPX",
    # Nobody looks after it for a long time.
    "orphan": "QPSF",
}  # fmt: skip


def expected(load: Load, does: str, *, calm: bool, stores_lost: bool, taken: bool) -> str:
    """What the steps of such a job must look like, as a pattern."""
    if does == "die" or (taken and not stores_lost):
        # Its queue lets it be tried again, or not. Where only what is can be read, all before its end may be missed.
        return "Q?(P[SQP]*)?[CF]" if load.sampled else "Q?P[SQP]*[CF]"
    path = PATHS[does]
    if stores_lost:
        # What a worker had in hand when Redis went away is taken up again, and its job may have failed of it.
        return "[QPSF]*[CFX]"
    if load.exact:
        return path
    if does == "removed":
        # A worker that has just taken a job may not see that it is removed, and finishes it: where only what is can be
        # read, that it was taken may be seen before, and its removal be missed.
        return "Q?P?X(P?C)?|Q?PC" if load.sampled else "Q?X(P?C)?"
    surely = calm and not load.sampled
    # What tells of a job that waits may be told later than that it is worked on.
    return "Q?" + "".join(letter if surely else f"{letter}?" for letter in path[1:-1]) + path[-1]
