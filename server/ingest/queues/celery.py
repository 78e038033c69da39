"""Celery: what the result backend publishes and what workers send; after a gap, the results that are kept."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import Final

import msgspec
import trio

from protocol.queues.celery import EVENT_MARK, RESULT_PREFIX, USER, Attempts, Told, read_events, read_result
from protocol.queues.payload import MAX_READ
from protocol.update import ENDED
from server.brokers.redis_client import Client, parse_redis_url
from server.ingest.queues.source import Heard, Source, ask, escaped, scan

_WAIT_S: Final = 0.5
_REPAIR_S: Final = 10.0
# Results that are looked at after a gap, for tasks that came and went meanwhile.
_MAX_SCANNED: Final = 20_000
_AT_ONCE: Final = 200
# Of what goes on being said meanwhile, not more than so much is waited for.
_ROUNDS: Final = 10
# Workers whose signs of life are noted; the longest unheard go first.
_MAX_WORKERS: Final = 10_000
# Of those the ones that are in the mark.
_MAX_ATTENDED: Final = 200
# A worker's clock that is behind ours must not hide what was missed.
_CLOCKS_MS: Final = 60_000


class Mark(msgspec.Struct, gc=False):
    """How far a session came: everything that was said up to a time, and who had signs of life to send then."""

    at_ms: int
    workers: list[str] = []


class Celery(Source):
    """``kind = "celery"``."""

    async def session(self, client: Client) -> None:
        """See ``Source``."""
        config = self.config
        self._user = config.user or USER
        self._results = f"{config.prefix}{RESULT_PREFIX}"
        self._attempts = Attempts()
        self._beats: dict[str, float] = {}
        patterns = [f"{escaped(self._results)}*"]
        events = f"/*{EVENT_MARK}*"
        elsewhere: Heard | None = None
        if config.events_url:
            database = parse_redis_url(config.events_url).database
            elsewhere = Heard(config.events_url, [f"/{database}{EVENT_MARK}*"])
        else:
            patterns.append(events)
        self._heard = [Heard(config.url, patterns)]
        if elsewhere is not None:
            self._heard.append(elsewhere)
        self._at_ms = round(time.time() * 1000)
        async with AsyncExitStack() as stack:
            for heard in self._heard:
                await stack.enter_async_context(heard.listening())
            await self._catch_up(client)
            next_repair = trio.current_time() + _REPAIR_S
            self.well()
            while True:
                await self._listen(_WAIT_S if elsewhere is None else 0.05)
                if trio.current_time() >= next_repair:
                    next_repair = trio.current_time() + _REPAIR_S
                    await self._repair(client)
                await self.save_mark(msgspec.json.encode(Mark(self._at_ms, self._attended())).decode())
                await self._look_for_the_dead()

    async def _listen(self, seconds: float) -> list[Told] | None:
        """Take in what was said, waiting so long for something; None if there was nothing."""
        messages = [message for heard in self._heard for message in await heard.take(seconds)]
        self._at_ms = at_ms = round(time.time() * 1000)
        told = [one for channel, payload in messages for one in self._hear(channel, payload, at_ms)]
        await self._take(told)
        return told if messages else None

    def _hear(self, channel: str, payload: bytes, at_ms: int) -> list[Told]:
        if channel.startswith(self._results):
            task = channel[len(self._results) :]
            one = read_result(payload, at_ms, self._user, results=self.config.results, large=task)
            return [] if one is None else [one]
        told: list[Told] = []
        for said in read_events(payload, at_ms, self._user) if EVENT_MARK in channel else ():
            if isinstance(said, Told):
                told.append(said)
                continue
            self._beats.pop(said.worker, None)
            self._beats[said.worker] = trio.current_time()
            if len(self._beats) > _MAX_WORKERS:
                del self._beats[next(iter(self._beats))]
        return told

    async def _take(self, told: list[Told]) -> None:
        """Of one task one at a time: where something belongs depends on what came of the one before."""
        together: dict[str, Told] = {}
        for one in told:
            if one.seen.job in together:
                await self._take_together(together)
                together = {}
            together[one.seen.job] = one
        await self._take_together(together)

    async def _take_together(self, told: dict[str, Told]) -> None:
        sightings = []
        for task, one in told.items():
            seen = self._attempts.place(self.taker.known("", task), one)
            if seen is not None:
                sightings.append(seen)
        await self.taker.take(sightings)
        for task, one in told.items():
            if one.seen.status in ENDED and one.by == "results":
                self._attempts.forget(task)

    async def _catch_up(self, client: Client) -> None:
        """What was said while nobody listened."""
        mark = _read_mark(await self.load_mark())
        await self._repair(client)
        if mark is None:
            return  # what ended before anybody was interested
        for worker in mark.workers:
            self._beats.setdefault(worker, trio.current_time())
        since_ms = mark.at_ms - _CLOCKS_MS
        tasks = [key[len(self._results) :] for key in await scan(client, f"{escaped(self._results)}*", _MAX_SCANNED)]
        fresh = [task for task in tasks if not self.taker.is_known("", task)]
        await self._read(client, fresh, since_ms)

    async def _repair(self, client: Client) -> None:
        """What is kept of the tasks that have not ended."""
        await self._read(client, [one.job for one in self.taker.open.values()], 0)

    async def _read(self, client: Client, tasks: list[str], since_ms: int) -> None:
        """Take in what is kept of tasks.

        What was said before it was read comes first, as it is older. What was said after that may come first as well:
        of a task of which something came, what is kept is left to the next time.
        """
        now_ms = round(time.time() * 1000)
        for start in range(0, len(tasks), _AT_ONCE):
            part = tasks[start : start + _AT_ONCE]
            answers = await ask(client, [("GETRANGE", self._results + task, 0, MAX_READ) for task in part])
            spoken_of: set[str] = set()
            for _ in range(_ROUNDS):
                heard = await self._listen(0)
                if heard is None:
                    break
                spoken_of.update(one.seen.job for one in heard)
            told: list[Told] = []
            for task, data in zip(part, answers, strict=True):
                if task in spoken_of:
                    continue
                one = read_result(data or b"", now_ms, self._user, results=self.config.results, large=task)
                if one is None or (since_ms and (one.seen.at_ms < since_ms or len(data) > MAX_READ)):
                    continue
                # A state that is kept is no new one: that it was to be tried again, say, has been counted.
                if one.word == "RETRY":
                    continue
                one.seen.unsure = True
                if one.seen.status in ENDED or not self.taker.is_silent("", one.seen.job):
                    told.append(one)
            await self._take(told)

    def _attended(self) -> list[str]:
        """Workers that are at work and have sent signs of life: whoever goes on has to notice if there are no more."""
        working = {one.worker for one in self.taker.open.values() if one.processing and one.worker is not None}
        return sorted(working & self._beats.keys())[:_MAX_ATTENDED]

    async def _look_for_the_dead(self) -> None:
        """Tasks of workers that have sent signs of life, and do not any more."""
        limit = self.config.stalled_after
        if not limit:
            return
        dead = {worker for worker, last in self._beats.items() if trio.current_time() - last > limit}
        if dead:
            silent = [name for name, one in self.taker.open.items() if one.processing and one.worker in dead]
            await self.taker.report_silent(silent, limit)
            for worker in dead:
                del self._beats[worker]


def _read_mark(mark: str | None) -> Mark | None:
    try:
        return msgspec.json.decode(mark, type=Mark) if mark else None
    except msgspec.DecodeError:
        return None
