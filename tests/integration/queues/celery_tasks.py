"""Tasks of a real Celery for the tests; ``CELERY_REDIS`` is where its Redis is."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Celery

URL = os.environ["CELERY_REDIS"]
app = Celery("tests", broker=f"{URL}/0", backend=f"{URL}/1")
app.conf.update(
    task_track_started=True,
    result_extended=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    task_routes={"celery_tasks.orphan": {"queue": "fragile"}},
)


def _work(task: Any) -> None:
    for current in (25, 60):
        meta = {"current": current, "total": 100, "message": "half of it", "stage": "encode"}
        task.update_state(state="PROGRESS", meta=meta)
        time.sleep(0.08)  # as work takes time


@app.task(bind=True)
def ok(self: Any, file: str, user_id: str = "") -> dict[str, str]:
    _work(self)
    return {"secret": "not for everybody"}


@app.task(bind=True)
def gather(self: Any, parts: list[Any], file: str, user_id: str = "") -> int:
    _work(self)
    return len(parts)


@app.task
def bad(file: str, user_id: str = "") -> None:
    raise RuntimeError("bad went wrong")


@app.task(bind=True, max_retries=1)
def flaky(self: Any, file: str, user_id: str = "") -> None:
    if not self.request.retries:
        raise self.retry(exc=ValueError("flaky went wrong"), countdown=0.2)
    _work(self)


@app.task
def slow(file: str, user_id: str = "") -> None:
    """Goes on until it is revoked."""
    time.sleep(60)


@app.task
def die(file: str, user_id: str = "") -> None:
    """The process that works on it is killed, in the middle of it."""
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def orphan(file: str, user_id: str = "") -> None:
    """Its worker is killed, the whole of it, in the middle of it."""
    time.sleep(0.1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def send(counts: dict[str, int]) -> dict[str, tuple[str, str]]:
    """Send so many of each, revoke what is to be revoked; each task's id with what it does and whose it is."""
    from celery import chain, chord, group

    sent: dict[str, tuple[str, str]] = {}
    running = []
    while len(app.control.ping(timeout=0.5)) < 2:
        pass
    for does, count in counts.items():
        for number in range(count):
            user = f"user_{number % 3}"

            def one(user: str = user) -> Any:
                return ok.si("private.mov", user_id=user)

            if does == "chain":
                last = chain(one(), one(), one()).apply_async()
                found = [last, last.parent, last.parent.parent]
            elif does == "group":
                found = group(one(), one(), one()).apply_async().results
            elif does == "chord":
                body = chord([one(), one(), one()])(gather.s("private.mov", user_id=user))
                found = [body, *body.parent.results]
            elif does == "removed":
                found = [ok.apply_async(("private.mov",), {"user_id": user}, countdown=2)]
                app.control.revoke(found[0].id)
            else:
                found = [globals()[does].delay("private.mov", user_id=user)]
                running += found if does == "slow" else []
            sent |= {result.id: ("ok" if does in ("chain", "group", "chord") else does, user) for result in found}
    while any(result.state != "STARTED" for result in running):
        time.sleep(0.05)
    app.control.revoke([result.id for result in running], terminate=True)
    return sent
