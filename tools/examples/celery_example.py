"""A Celery application as it might be: nothing in it knows of statuswire."""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any

from celery import Celery

REDIS = os.environ["EXAMPLE_REDIS"]
app = Celery("celery_example", broker=f"{REDIS}/0", backend=f"{REDIS}/1")
app.conf.update(task_track_started=True, result_extended=True)


def encode(self: Any, file: str, user_id: str) -> str:
    """Takes some seconds, and fails now and then: once for a retry, seldom for good."""
    for percent in range(0, 100, random.randint(4, 12)):
        self.update_state(state="PROGRESS", meta={"current": percent, "total": 100, "message": f"Encoding {percent} %"})
        time.sleep(random.uniform(0.1, 0.6))
        if random.random() < 0.02:
            raise self.retry(exc=RuntimeError("ffmpeg exited with code 1"), countdown=2, max_retries=1)
    return "/out/1.mp4"


task = app.task(bind=True, name="encode")(encode)

if __name__ == "__main__":
    task.delay("a.mov", user_id=sys.argv[1])
