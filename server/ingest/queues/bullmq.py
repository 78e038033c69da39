"""BullMQ: the streams of events, read from where the last session came to; what they have lost is in the hashes."""

from __future__ import annotations

import math
import time
from typing import Any, Final

import msgspec
import trio

from protocol.queues.bullmq import job_key, read_event, seq_of, stream_key
from protocol.queues.sighting import Sighting
from protocol.update import CANCELLED
from server.brokers.redis_client import Client
from server.ingest.intake import AT_ONCE
from server.ingest.queues.bull import Watch, describe, look, prefix_of
from server.ingest.queues.source import Search, Source, ask, escaped, texts
from server.ingest.queues.taker import Open

# Of each stream at a time: as many as were not too much before.
_COUNT: Final = 500
_COUNT_AT_FIRST: Final = 50
# Bytes at a time. What jobs return stands in events, and may be of any size.
_HELD: Final = 8 * 1024 * 1024
# Below what a silent connection is given.
_BLOCK_MS: Final = 500
# Under load events are read so often and not more: together they cost half of what they do one by one.
_GATHER_S: Final = 0.03
_DISCOVER_S: Final = 2.0
# For so long queues are looked for between two readings.
_SEARCH_S: Final = 0.02
MAX_QUEUES: Final = 1000
# So often it is looked whether some of the jobs that have not ended are still there.
_CHECK_EVERY_S: Final = 1.0
_CHECKED: Final = 100
# Events while hashes are read.
_MEANWHILE: Final = 10_000
_BEGINNING: Final = "0-0"


class BullMq(Source):
    """``kind = "bullmq"``."""

    async def session(self, client: Client) -> None:
        """See ``Source``."""
        places = _places(await self.load_mark())
        self._count = _COUNT_AT_FIRST
        self._behind: dict[str, None] = {}
        watch = Watch(self.taker, self.config)
        self._unchecked: list[str] = []
        self._missing: dict[str, int] = {}
        self._next_check = trio.current_time() + _CHECK_EVERY_S
        self._queues: dict[str, str] = {}
        for queue in self.config.queues:
            await self._begin(client, queue, places.get(queue))
        search: Search | None = None
        searched = bool(self.config.queues)
        next_search = math.inf if self.config.queues else -1.0
        while True:
            if trio.current_time() >= next_search:
                prefix = prefix_of(self.config)
                search, next_search = Search(client, f"{escaped(prefix)}:*:meta", MAX_QUEUES, prefix), math.inf
            if search is not None:
                for queue in self._named(await search.look(_SEARCH_S)):
                    await self._begin(client, queue, places.get(queue))
                if search.done:
                    # A Redis with millions of other keys is not looked through all the time.
                    next_search = trio.current_time() + max(_DISCOVER_S, 50 * search.took_s)
                    search, searched = None, True
            if not self._queues:
                if searched:
                    self.well()
                    await trio.sleep(_BLOCK_MS / 1000)
                continue
            began = trio.current_time()
            caught_up = await self._read(client, 1 if search else _BLOCK_MS)
            if caught_up:
                for queue in list(self._behind):
                    await self._repair(client, queue)
                if searched:
                    self.well()
                await watch.look(client)
                if searched:  # else there may be streams that nobody has read yet
                    await self._look_for_the_removed(client)
            if searched:  # else it would forget the places of those that are not found yet
                await self.save_mark(msgspec.json.encode(self._queues).decode())
            if caught_up and not search:
                await trio.sleep_until(began + _GATHER_S)

    def _named(self, keys: list[str]) -> list[str]:
        """The queues that these keys are of, and that are not known."""
        names = [key[len(prefix_of(self.config)) + 1 : -len(":meta")] for key in keys]
        # BullMQ allows no colon in a queue's name. A job's id may have two of them, and end like that.
        fresh = [name for name in names if ":" not in name and name not in self._queues]
        return fresh[: MAX_QUEUES - len(self._queues)]

    async def _begin(self, client: Client, queue: str, place: str | None) -> None:
        """Go on from a place in the stream, or from its beginning; note whether something may be missing before."""
        self._queues[queue] = place or _BEGINNING
        if place is None or await self._is_trimmed(client, queue):
            self._behind[queue] = None

    async def _is_trimmed(self, client: Client, queue: str) -> bool:
        """Whether the stream does not reach back to where this one is."""
        (oldest,) = await ask(client, [("XRANGE", stream_key(prefix_of(self.config), queue), "-", "+", "COUNT", 1)])
        return not oldest or seq_of(oldest[0][0].decode()) > seq_of(self._queues[queue])

    async def _read(self, client: Client, block_ms: int) -> bool:
        """Read on in all streams. True if there was no more than this."""
        prefix = prefix_of(self.config)
        by_key = {stream_key(prefix, queue).encode(): queue for queue in self._queues}
        command: tuple[bytes | str | int, ...]
        command = ("XREAD", "COUNT", self._count, "BLOCK", block_ms, "STREAMS", *by_key, *self._queues.values())
        answer: list[Any] = await client.call(*command) or []
        full = [by_key[key] for key, entries in answer if len(entries) >= self._count]
        size = sum(len(value) for _, entries in answer for _, values in entries for value in values or ())
        self._count = min(_COUNT, 2 * self._count, max(1, self._count * _HELD // max(1, size)))
        for queue in full:
            # Far behind: the stream may be cut faster than it is read.
            if self._queues[queue] != _BEGINNING and await self._is_trimmed(client, queue):
                self._behind[queue] = None
        sightings: list[Sighting] = []
        places: dict[str, str] = {}
        for number, (key, entries) in enumerate(answer, 1):
            queue = by_key[key]
            for entry_id, values in entries:
                fields = texts(values or [])
                seen = read_event(queue, entry_id.decode(), fields, results=self.config.results)
                if seen is not None:
                    sightings.append(seen)
            places[queue] = entries[-1][0].decode()
            # Of several streams together: few at a time cost more.
            if len(sightings) >= AT_ONCE or number == len(answer):
                await describe(client, self.taker, self.config, sightings)
                await self.taker.take(sightings)
                self._queues |= places
                sightings, places = [], {}
        return not full

    async def _repair(self, client: Client, queue: str) -> None:
        """Take from the hashes what the stream does not tell any more."""
        key, place = stream_key(prefix_of(self.config), queue), self._queues[queue]
        sightings = await look(client, self.taker, self.config, queue, seq_of(place))
        # What will be read from the stream is in some hashes already: not twice, and not without the steps before it.
        (later,) = await ask(client, [("XRANGE", key, f"({place}", "+", "COUNT", _MEANWHILE)])
        if later is not None and len(later) == _MEANWHILE:
            return  # first what there is to be read
        moving = {texts(values or []).get("jobId") for _, values in later or ()}
        await self.taker.take([seen for seen in sightings if seen.job not in moving])
        self._behind.pop(queue, None)

    async def _look_for_the_removed(self, client: Client) -> None:
        """Jobs of a queue that was drained, cleaned or obliterated: there is no event of that.

        One that is missing, and of which all events were read since without one about it, has not ended otherwise.
        """
        if trio.current_time() < self._next_check:
            return
        self._next_check = trio.current_time() + _CHECK_EVERY_S
        now_ms = round(time.time() * 1000)
        # Its id may have been used again since, or its end only been read now: then its record has moved on.
        found = ((self.taker.open.get(name), seq) for name, seq in self._missing.items())
        gone = [one for one, seq in found if one is not None and self._seq(one) == seq]
        await self.taker.take(
            [Sighting(job=one.job, queue=one.queue, at_ms=now_ms, status=CANCELLED, removed=True) for one in gone]
        )
        if not self._unchecked:
            self._unchecked = list(self.taker.open)
        part, self._unchecked = self._unchecked[:_CHECKED], self._unchecked[_CHECKED:]
        jobs = {name: one for name in part if (one := self.taker.open.get(name)) and one.queue not in self._behind}
        seqs, prefix = [self._seq(one) for one in jobs.values()], prefix_of(self.config)
        there = await ask(client, [("EXISTS", job_key(prefix, one.queue, one.job)) for one in jobs.values()])
        self._missing = {name: seq for name, seq, exists in zip(jobs, seqs, there, strict=True) if not exists}

    def _seq(self, one: Open) -> int:
        known = self.taker.known(one.queue, one.job)
        return -1 if known is None else known.seq


def _places(mark: str | None) -> dict[str, str]:
    try:
        return msgspec.json.decode(mark, type=dict[str, str]) if mark else {}
    except msgspec.DecodeError:
        return {}
