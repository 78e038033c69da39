"""Tasks of a real Celery for the tests; ``CELERY_REDIS`` is where its Redis is."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Celery

URL = os.environ["CELERY_REDIS"]
app = Celery("tests", broker=f"{URL}/0", backend=f"{URL}/1")
app.conf.update(task_track_started=True, result_extended=True, worker_prefetch_multiplier=1)


@app.task(bind=True)
def ok(self: Any, file: str, user_id: str = "") -> dict[str, str]:
    for current in (25, 60):
        self.update_state(state="PROGRESS", meta={"current": current, "total": 100, "message": "half of it"})
        time.sleep(0.01)
    return {"secret": "not for everybody"}


@app.task
def bad(file: str, user_id: str = "") -> None:
    raise RuntimeError("bad went wrong")


@app.task(bind=True, max_retries=1)
def flaky(self: Any, file: str, user_id: str = "") -> None:
    if not self.request.retries:
        raise self.retry(exc=ValueError("flaky went wrong"), countdown=0.1)


@app.task
def slow(file: str, user_id: str = "") -> None:
    time.sleep(60)


@app.task
def die(file: str, user_id: str = "") -> None:
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
