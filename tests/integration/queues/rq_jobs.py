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
        job.meta.update(progress=progress, message="half of it")
        job.save_meta()
        time.sleep(0.01)
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


def die(file: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
