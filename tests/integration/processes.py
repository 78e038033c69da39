"""Other people's programs, as processes that end when a test does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Process = subprocess.Popen[bytes]
Start = Callable[..., Process]


@contextmanager
def processes(directory: Path, *, piped: bool = False, grace_s: float = 0.0, **environment: str) -> Iterator[Start]:
    """Start processes, with the words of a command and more of the environment; they end with the block, and with us.

    Args:
        directory: where they run; what they say is in ``workers.log`` there.
        piped: what they print is to be read instead.
        grace_s: how long they may take to end in order, which tells what the coverage of their code was.
        environment: of all of them, beside our own.
    """
    started: list[Process] = []

    def start(*command: str, **more: str) -> Process:
        with (directory / "workers.log").open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=os.environ | environment | more,
                cwd=directory,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    try:
        yield start
    finally:
        if grace_s:
            for process in started:
                process.terminate()
            deadline = time.monotonic() + grace_s
            for process in started:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        for process in started:
            # What it had begun may be left although it is gone itself.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
