"""Jobs of RQ as they might be: nothing in here knows of statuswire."""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any

from rq import Queue, Retry, get_current_job


def encode(file: str) -> str:
    """Takes some seconds, and fails now and then."""
    job: Any = get_current_job()
    for percent in range(0, 100, random.randint(4, 12)):
        job.meta.update(progress=percent, message=f"Encoding {percent} %")
        job.save_meta()
        time.sleep(random.uniform(0.1, 0.4))
        if random.random() < 0.02:
            raise RuntimeError("ffmpeg exited with code 1")
    return "/out/1.mp4"


if __name__ == "__main__":
    from redis import Redis

    queue = Queue("example", connection=Redis.from_url(os.environ["EXAMPLE_REDIS"]))
    queue.enqueue("rq_example.encode", "a.mov", meta={"user_id": sys.argv[1]}, retry=Retry(max=1))
