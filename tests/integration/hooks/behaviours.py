"""What the jobs of the tests do, in whatever queue they are."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from statuswire import flush
from statuswire.hooks import current_job, progress

HERE = Path.cwd()
KINDS = ("ok", "bad", "flaky", "asked")


def ok() -> dict[str, int]:
    progress(40, "half of it", stage="first", steps=(2, 5))
    return {"rows": 5}


def bad() -> None:
    progress(10)
    raise ValueError("bad went\nwrong")


def first_time(name: str) -> bool:
    """Whether this job has not been here before."""
    mark = HERE / f"{name}.seen"
    if mark.exists():
        return False
    mark.touch()
    return True


def die() -> None:
    progress(30, "about to die")
    assert flush(30)
    os.kill(os.getpid(), signal.SIGKILL)


def asked() -> None:
    """Goes on until somebody cancels it; ``progress`` raises then."""
    for step in range(600):
        progress(step / 10)
        job = current_job()
        assert job is not None
        time.sleep(0.05)
