"""What a machine does besides, left out of the times that are measured on it.

A loop that others keep from running measures them, and so does a server: ``LoopClock`` stands still while the loop of
whoever measures does, and ``slowed`` tells by which factor a process was held up by others that wanted to run as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

TICK_S: Final = 0.02


class LoopClock:
    """A clock of a Trio loop, right while ``run`` runs: seconds in which the loop could do something."""

    def __init__(self) -> None:
        self._due = math.inf  # when the loop should have its next turn
        self._stood = 0.0  # for how long it had none when it should

    def __call__(self) -> float:
        """What time it is."""
        now = time.monotonic()
        return now - self._stood - max(0.0, now - self._due)

    async def run(self) -> None:
        """Look how late the loop is, until cancelled."""
        while True:
            self._due = time.monotonic() + TICK_S
            await trio.sleep(TICK_S)
            self._stood += max(0.0, time.monotonic() - self._due)


def waits_of(pid: int) -> dict[str, float]:
    """For how long each thread of a process could run and others did, and ``""`` what time it is; seconds."""
    found = {"": time.monotonic()}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found[str(thread)] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return found


def slowed(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """By which factor its threads together took longer between two looks at ``waits_of``: what is done goes through
    each of them. What a process does with the time that it gets is its own affair; how much that is, is not."""
    factor = 1.0
    for name in before.keys() & after.keys() - {""}:
        length = after[""] - before[""]
        factor *= length / max(length / 100, length - (after[name] - before[name]))
    return factor
