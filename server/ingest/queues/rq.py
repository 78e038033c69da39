"""RQ: the hashes of jobs, read when Redis gives notice that they were written, or in turn where it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Final

import trio

from protocol.queues.rq import JOB_PREFIX, QUEUES, RESULT_PREFIX, USER, read_job
from protocol.queues.sighting import Sighting
from protocol.resp import RedisError
from protocol.update import CANCELLED, COMPLETED
from server.brokers.redis_client import Client, parse_redis_url
from server.ingest.queues.source import Heard, Source, ask
from server.ingest.queues.taker import MAX_OPEN
from server.logs import log_event

_FIELDS: Final = (
    "status", "created_at", "enqueued_at", "ended_at", "meta", "worker_name", "origin", "last_heartbeat", "exc_info",
    "started_at",
)  # fmt: skip
_FRESH_FIELDS: Final = (*_FIELDS, "data")
# Where a queue's jobs are listed, besides in ``rq:queue:<name>``: each is a sorted set ``rq:<registry>:<name>``.
_REGISTRIES: Final = ("wip", "scheduled", "deferred")
_ENDED_REGISTRIES: Final = ("finished", "failed", "canceled")
_MAX_LISTED: Final = 1000
# Of those that have ended the newest; the notices tell of the others.
_MAX_ENDED: Final = 200
_AT_ONCE: Final = 200
# Bytes of a job's pickles that take a millisecond to read.
_LARGE: Final = 4096
_WAIT_S: Final = 0.5
_REPAIR_S: Final = 10.0

_LOG: Final = logging.getLogger("statuswire.ingest")


class Rq(Source):
    """``kind = "rq"``."""

    async def session(self, client: Client) -> None:
        """See ``Source``."""
        database = parse_redis_url(self.config.url).database
        channel = f"__keyspace@{database}__:{JOB_PREFIX}"
        # The last sign of life of each job, and when it was first seen here: workers' clocks may be wrong.
        self._beats: dict[str, tuple[bytes, float]] = {}
        async with AsyncExitStack() as stack:
            heard: Heard | None = None
            if await self._gives_notice(client):
                heard = Heard(self.config.url, [f"{channel}*"])
                await stack.enter_async_context(heard.listening())
            else:
                log_event(
                    _LOG, logging.INFO, "queue_polled", source=self.name, every=self.config.poll,
                    advice="redis-cli config set notify-keyspace-events Kgh shows every step at once",
                )  # fmt: skip
            every = self.config.poll if heard is None else _REPAIR_S
            next_look = -1.0
            while True:
                if trio.current_time() >= next_look:
                    await self._look(client)
                    next_look = trio.current_time() + every
                    self.well()
                    await self._look_for_the_dead(client)
                if heard is None:
                    await trio.sleep_until(next_look)
                    continue
                messages = await heard.take(_WAIT_S)
                # Other keys begin like a job's: those have another colon.
                changed = dict.fromkeys(name[len(channel) :] for name, _ in messages)
                await self._read(client, [job for job in changed if job and ":" not in job])

    async def _gives_notice(self, client: Client) -> bool:
        """Whether writing a hash is announced: ``K`` with ``h``, or with ``A`` for everything."""
        try:
            answer = await client.call("CONFIG", "GET", "notify-keyspace-events")
        except RedisError:
            return False  # nobody may ask
        flags = answer[1].decode() if answer else ""
        return "K" in flags and ("h" in flags or "A" in flags)

    async def _look(self, client: Client) -> None:
        """Read the jobs that are listed anywhere and of which the end is not known."""
        queues = list(self.config.queues)
        if not queues:
            found = (await ask(client, [("SMEMBERS", QUEUES)]))[0] or []
            queues = [name.decode("utf-8", "replace").removeprefix("rq:queue:") for name in found]
        live: list[tuple[str | int, ...]] = []
        ended: list[tuple[str | int, ...]] = []
        for queue in queues:
            live.append(("LRANGE", f"rq:queue:{queue}", 0, _MAX_LISTED - 1))
            live += [("ZRANGE", f"rq:{registry}:{queue}", 0, _MAX_LISTED - 1) for registry in _REGISTRIES]
            ended += [("ZREVRANGE", f"rq:{registry}:{queue}", 0, _MAX_ENDED - 1) for registry in _ENDED_REGISTRIES]
        answers = await ask(client, [*live, *ended])
        # One that is listed as alive may have ended before; it is worked on again.
        jobs = dict.fromkeys(_ids(answers[: len(live)]))
        jobs.update(dict.fromkeys(job for job in _ids(answers[len(live) :]) if not self.taker.has_ended("", job)))
        jobs.update(dict.fromkeys(one.job for one in self.taker.open.values()))
        await self._read(client, list(jobs))

    async def _read(self, client: Client, jobs: list[str]) -> None:
        for start in range(0, len(jobs), _AT_ONCE):
            part = jobs[start : start + _AT_ONCE]
            fresh = [not self.taker.is_known("", job) for job in part]
            answers = await ask(
                client,
                [
                    ("HMGET", JOB_PREFIX + job, *(_FRESH_FIELDS if new else _FIELDS))
                    for job, new in zip(part, fresh, strict=True)
                ],
            )
            hashes = [_hash(values) for values in answers]
            ends = await self._ends(client, part, hashes)
            now_ms = round(time.time() * 1000)
            sightings = []
            for job, new, data, end in zip(part, fresh, hashes, ends, strict=True):
                seen = self._see(job, new, data, end, now_ms)
                if seen is not None:
                    sightings.append(seen)
                if len(data.get("data", b"")) + len(data.get("meta", b"")) > _LARGE:
                    await trio.lowlevel.checkpoint()  # reading it took long
            await self.taker.take(sightings)

    async def _ends(self, client: Client, jobs: list[str], hashes: list[dict[str, bytes]]) -> list[dict[str, bytes]]:
        """The newest result of those that have ended."""
        wanted = [
            job
            for job, data in zip(jobs, hashes, strict=True)
            if data.get("status") == b"failed" or (self.config.results and data.get("status") == b"finished")
        ]
        answers = await ask(client, [("XREVRANGE", RESULT_PREFIX + job, "+", "-", "COUNT", 1) for job in wanted])
        found = {
            job: {name.decode("utf-8", "replace"): value for name, value in zip(*[iter(rows[0][1])] * 2, strict=True)}
            for job, rows in zip(wanted, answers, strict=True)
            if rows
        }
        return [found.get(job, {}) for job in jobs]

    def _see(
        self, job: str, fresh: bool, data: dict[str, bytes], end: dict[str, bytes], now_ms: int
    ) -> Sighting | None:
        if data:
            wanted, origin = self.config.queues, data.get("origin", b"").decode("utf-8", "replace")
            if wanted and origin not in wanted:
                return None
            if data.get("status") == b"started":
                known = job in self._beats
                beats = self._hear_beat(job, data.get("last_heartbeat", b"")) == 0
                # That a job is listed as worked on says nothing of a worker that is believed dead; a new sign does.
                if not (known and beats) and self.taker.is_silent("", job):
                    return None
            user = self.config.user or USER
            return read_job(job, data, end, now_ms, user, fresh=fresh, results=self.config.results)
        one = self.taker.open.get(self.taker.name("", job))
        if one is None:
            return None
        # Gone: with result_ttl = 0 a job leaves no trace when it succeeds; one that waited was taken away.
        status = COMPLETED if one.processing else CANCELLED
        return Sighting(job=job, at_ms=now_ms, status=status, removed=True)

    def _hear_beat(self, job: str, beat: bytes) -> float:
        """For how many seconds this has been the worker's last sign of life; 0 if it is another than before."""
        now = trio.current_time()
        last, since = self._beats.pop(job, (None, now))
        if beat != last:
            since = now
        self._beats[job] = beat, since
        if len(self._beats) > MAX_OPEN:
            del self._beats[next(iter(self._beats))]
        return now - since

    async def _look_for_the_dead(self, client: Client) -> None:
        """Jobs whose workers do not say any more that they are at it."""
        limit = self.config.stalled_after
        names = [name for name, one in self.taker.open.items() if one.processing] if limit else []
        silent = []
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            jobs = [self.taker.open[name].job for name in part]
            answers = await ask(client, [("HGET", JOB_PREFIX + job, "last_heartbeat") for job in jobs])
            for name, value in zip(part, answers, strict=True):
                if value and self._hear_beat(self.taker.open[name].job, value) > limit:
                    silent.append(name)
        await self.taker.report_silent(silent, limit)


def _ids(answers: Iterable[Any]) -> Iterator[str]:
    """The jobs in these lists. Of one that is being worked on there stand the job and the execution."""
    for members in answers:
        for member in members or ():
            yield member.decode("utf-8", "replace").partition(":")[0]


def _hash(values: Any) -> dict[str, bytes]:
    """What HMGET found; nothing if the key is no hash."""
    return {name: value for name, value in zip(_FRESH_FIELDS, values or (), strict=False) if value is not None}
