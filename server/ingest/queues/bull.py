"""What BullMQ and Bull keep of a queue: which jobs are where, and their hashes. For what was missed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import trio

from protocol.queues import bullmq
from protocol.queues.payload import MAX_READ
from protocol.queues.sighting import Sighting
from protocol.update import CANCELLED, ENDED, FAILED, QUEUED
from server.brokers.redis_client import Client
from server.config import Queue
from server.ingest.queues.source import ask
from server.ingest.queues.taker import Taker

# Of each place; more are waiting than anyone looks at, and older ends are no news.
MAX_LISTED: Final = 1000
_AT_ONCE: Final = 100
# Bytes of what jobs carry that are read at a time.
_HELD: Final = 8 * 1024 * 1024
_TOLD: Final = (*bullmq.TELLS, "returnvalue")
_LARGE: Final = frozenset(("data", "parent", "returnvalue", "progress", "failedReason"))
_LISTS: Final = frozenset(("active", "wait", "paused"))
_FROM_THE_END: Final = frozenset(("completed", "failed"))


def prefix_of(config: Queue) -> str:
    """In front of all keys."""
    return config.prefix or bullmq.PREFIX


def user_of(config: Queue) -> str:
    """Where owners are."""
    return config.user or bullmq.USER


async def describe(client: Client, taker: Taker, config: Queue, sightings: list[Sighting]) -> None:
    """Read of jobs that have no record yet whose they are, and of which they are a child."""
    fresh: dict[tuple[str, str], list[Sighting]] = {}
    for seen in sightings:
        if not taker.is_known(seen.queue, seen.job):
            fresh.setdefault((seen.queue, seen.job), []).append(seen)
    if not fresh:
        return
    prefix, user = prefix_of(config), user_of(config)
    seen_of = list(fresh.values())

    def take(number: int, data: dict[str, str]) -> None:
        for seen in seen_of[number] if "name" in data else ():
            bullmq.describe(seen, data, user, prefix)

    await _read_hashes(client, [(bullmq.job_key(prefix, queue, job), bullmq.DESCRIBES) for queue, job in fresh], take)


async def _read_hashes(
    client: Client, wanted: Sequence[tuple[str, Sequence[str]]], take: Callable[[int, dict[str, str]], object]
) -> None:
    """Read fields of hashes; ``take`` is given the number of each, and what it has; "" for what is too large.

    What jobs carry may be of any size, and of many jobs at once it would not fit into memory.
    """
    asked: list[tuple[str | int, ...]] = [
        ("HSTRLEN", key, name) for key, names in wanted for name in names if name in _LARGE
    ]
    lengths = iter(await ask(client, asked))
    part: list[tuple[int, tuple[str, ...], dict[str, str]]] = []
    held = 0
    for number, (key, names) in enumerate(wanted):
        long = {name: next(lengths) or 0 for name in names if name in _LARGE}
        too_long = {name: "" for name, length in long.items() if length > MAX_READ}
        part.append((number, ("HMGET", key, *(name for name in names if name not in too_long)), too_long))
        held += sum(length for name, length in long.items() if name not in too_long)
        if held > _HELD or len(part) >= _AT_ONCE or number == len(wanted) - 1:
            answers = await ask(client, [command for _, command, _ in part])
            for (which, command, data), values in zip(part, answers, strict=True):
                pairs = zip(command[2:], values or (), strict=False)
                take(which, data | {name: str(value, "utf-8", "replace") for name, value in pairs if value is not None})
            part.clear()
            held = 0
            await trio.lowlevel.checkpoint()


async def count(client: Client, config: Queue, sightings: list[Sighting]) -> None:
    """Read of jobs that wait which attempt that is: they may have been looked at since, and what is heard is late."""
    waiting = [seen for seen in sightings if seen.status == QUEUED and not seen.again]
    prefix = prefix_of(config)
    commands = [("HGET", bullmq.job_key(prefix, seen.queue, seen.job), "attemptsMade") for seen in waiting]
    for seen, made in zip(waiting, await ask(client, commands), strict=True):
        seen.attempt = 1 + (int(made) if made and made.isdigit() and len(made) < 10 else 0)


async def look(client: Client, taker: Taker, config: Queue, queue: str, seq: int) -> list[Sighting]:
    """What is where in a queue, as far as its records here do not say so already.

    Args:
        seq: the number of the newest event there was before; 0 in a queue without numbers.
    """
    prefix = prefix_of(config)
    commands: list[tuple[str | int, ...]] = []
    for place in bullmq.PLACES:
        key = f"{prefix}:{queue}:{place}"
        if place in _LISTS:
            commands.append(("LRANGE", key, 0, MAX_LISTED - 1))
        else:
            commands.append(("ZREVRANGE" if place in _FROM_THE_END else "ZRANGE", key, 0, MAX_LISTED - 1))
    answers = await ask(client, commands)
    places: dict[str, str] = {}
    for place, members in zip(bullmq.PLACES, answers, strict=True):
        for member in members or ():
            job = member.decode("utf-8", "replace")
            # Markers of older versions stand among the waiting.
            if not job.startswith("0:"):
                places.setdefault(job, place)
    ours = [one.job for one in taker.open.values() if one.queue == queue and one.job not in places]
    scores = await ask(
        client, [("ZSCORE", f"{prefix}:{queue}:{place}", job) for job in ours for place in ("completed", "failed")]
    )
    for number, job in enumerate(ours):
        if scores[2 * number] is not None:
            places[job] = "completed"
        elif scores[2 * number + 1] is not None:
            places[job] = "failed"
    wanted = [
        job
        for job, place in places.items()
        if not (place in _FROM_THE_END and taker.has_ended(queue, job))
        and not (place == "active" and taker.is_silent(queue, job))
    ]
    missing = [job for job in ours if job not in places]
    return [
        *await _read(client, taker, config, queue, wanted, places, seq),
        *await _vanished(client, taker, config, queue, missing, seq),
    ]


async def _read(
    client: Client, taker: Taker, config: Queue, queue: str, jobs: list[str], places: dict[str, str], seq: int
) -> list[Sighting]:
    prefix = prefix_of(config)
    found: list[Sighting] = []
    wanted = [
        (bullmq.job_key(prefix, queue, job), _TOLD if taker.is_known(queue, job) else (*_TOLD, *bullmq.DESCRIBES))
        for job in jobs
    ]

    def take(number: int, data: dict[str, str]) -> None:
        job = jobs[number]
        if not data:
            return
        # It may have ended since it was listed.
        place = places[job]
        if "finishedOn" in data and bullmq.PLACES[place] not in ENDED:
            place = "completed" if "returnvalue" in data else "failed"
        seen = bullmq.read_hash(queue, job, data, place, seq, results=config.results)
        if "name" in data:
            bullmq.describe(seen, data, user_of(config), prefix)
        # Bull does not count an attempt whose worker has died.
        known = taker.known(queue, job)
        if known is not None and seen.attempt is not None:
            seen.attempt = max(seen.attempt, known.attempt)
        found.append(seen)

    await _read_hashes(client, wanted, take)
    return found


async def _vanished(
    client: Client, taker: Taker, config: Queue, queue: str, jobs: list[str], seq: int
) -> list[Sighting]:
    """Jobs that are nowhere: they were removed, by somebody or after their end.

    Bull does not tell that a job was removed that nobody had begun. Otherwise events were lost, and which end it was.
    """
    prefix = prefix_of(config)
    answers = await ask(client, [("EXISTS", bullmq.job_key(prefix, queue, job)) for job in jobs])
    now_ms = round(time.time() * 1000)
    found = []
    for job, there in zip(jobs, answers, strict=True):
        if there:
            continue
        one = taker.open.get(taker.name(queue, job))
        seen = Sighting(job=job, queue=queue, at_ms=seq >> 20 if seq else now_ms, seq=seq or None, removed=True)
        if seq or (one is not None and one.processing):
            seen.status, seen.error = FAILED, "its end was missed"
        else:
            seen.status = CANCELLED
        found.append(seen)
    return found


class Watch:
    """Notices workers that have died: the locks of their jobs run out.

    A lock that is missing twice, some seconds apart, with the job still active: nobody works on it.
    """

    def __init__(self, taker: Taker, config: Queue) -> None:
        self._taker = taker
        self._config = config
        self._every_s = max(0.5, min(5.0, config.stalled_after / 4))
        self._next = trio.current_time() + self._every_s

    async def look(self, client: Client) -> None:
        """Look if it is time to."""
        if not self._config.stalled_after or trio.current_time() < self._next:
            return
        now = trio.current_time()
        self._next = now + self._every_s
        prefix, open_jobs = prefix_of(self._config), self._taker.open
        names = [name for name, one in open_jobs.items() if one.processing]
        silent = []
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            jobs = [open_jobs[name] for name in part]
            answers = await ask(
                client, [("EXISTS", f"{bullmq.job_key(prefix, one.queue, one.job)}:lock") for one in jobs]
            )
            for name, one, there in zip(part, jobs, answers, strict=True):
                if there:
                    one.silent_since = 0.0
                elif not one.silent_since:
                    one.silent_since = now
                else:
                    silent.append(name)
        await self._taker.report_silent(silent, self._config.stalled_after)
