"""Jobs of a real RQ for the tests."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from rq import get_current_job


def _job() -> Any:
    return get_current_job()


def ok(file: str) -> dict[str, str]:
    job = _job()
    for progress in (25, 60):
        job.meta.update(progress=progress, message="half of it", stage="encode")
        job.save_meta()
        time.sleep(0.04)  # as work takes time
    return {"secret": "not for everybody"}


def bad(file: str) -> None:
    raise RuntimeError("bad went wrong")


def flaky(file: str) -> None:
    time.sleep(0.4)  # RQ keeps only what is: who reads it later than that has missed it
    job = _job()
    if not job.meta.get("tried"):
        job.meta["tried"] = True
        job.save_meta()
        raise ValueError("flaky went wrong")


def slow(file: str) -> None:
    """Goes on until it is stopped."""
    job = _job()
    job.meta["begun"] = True
    job.save_meta()
    time.sleep(60)


def die(file: str) -> None:
    """Of a worker the process that does the work is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def orphan(file: str) -> None:
    """Of a worker everything is killed."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def send(url: str, counts: dict[str, int]) -> dict[str, tuple[str, str]]:
    """Put so many of each into the queue; each job's id with what it does and whose it is."""
    from redis import Redis
    from rq import Queue, Retry
    from rq.command import send_stop_job_command

    sent: dict[str, tuple[str, str]] = {}
    with Redis.from_url(url) as connection:
        video, fragile = Queue("video", connection=connection), Queue("fragile", connection=connection)
        running = []
        for does, count in counts.items():
            for number in range(count):
                meta = {"user_id": f"user_{number % 3}"}
                function = globals().get(does, ok)
                queue = fragile if does == "orphan" else video
                retry = Retry(1) if does == "flaky" else None
                job = queue.create_job(function, ("private.mov",), meta=meta, retry=retry)
                sent[job.id] = (does, meta["user_id"])
                if does == "child":
                    # RQ forgets one that comes while the other is ending: so it comes before that is begun.
                    job.save()
                    after = queue.enqueue(ok, "private.mov", meta=meta, depends_on=job)
                    sent[after.id] = ("child", meta["user_id"])
                queue.enqueue_job(job)
                if does == "removed":
                    job.cancel()
                elif does == "slow":
                    running.append(job)
        for job in running:
            # The job itself says so: its worker calls it started before there is a process to be stopped.
            while not job.get_meta(refresh=True).get("begun"):
                time.sleep(0.05)
            send_stop_job_command(connection, job.id)
    return sent
