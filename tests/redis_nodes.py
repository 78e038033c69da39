"""Several servers on one Redis, and a load on all of them that nothing may be lost of."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import trio
import trio.testing

from protocol.errors import ApiError
from protocol.fields import decode_fields
from server.brokers.base import Accepted, Publish
from tests.pacing import for_a_while
from tests.streams import WebSocket, session
from tests.support import PATIENCE_S, InProcess, server, until

RESUMED_S = 10.0  # promised: with Redis back, every node's readers get updates again


@asynccontextmanager
async def nodes(url: str, count: int = 2, **tables: Any) -> AsyncIterator[list[InProcess]]:
    """So many servers, each of which has its lease."""
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(server(store={"url": url}, **tables)) for _ in range(count)]
        await until(lambda: all(joined(at) for at in running))
        yield running


def joined(at: InProcess) -> bool:
    """Whether it is one of the nodes that the others know of."""
    return at.node.cluster is not None and at.node.cluster.joined


async def publish(
    at: InProcess, job_id: str, *, key: str | None = None, tries: list[int] | None = None, **fields: object
) -> Accepted:
    """Publish past HTTP, and again while the store is away; ``tries`` gets how often it took."""
    data = decode_fields(json.dumps(fields).encode())
    for count in itertools.count(1):
        if tries is not None:
            tries[:] = [count]
        submission = at.node.broker.submit([Publish(job_id, data, "may", "worker", key)])
        try:
            await submission.wait_kept()
        except ApiError as error:
            if error.code != "store_unavailable":
                raise
            await for_a_while(0.05)
            continue
        (result,) = submission.results
        assert isinstance(result, Accepted), result
        return result
    raise AssertionError


class Watcher:
    """Reads all that one node says of all jobs."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ready = trio.Event()

    async def run(self, at: InProcess) -> None:
        async with session(at) as ws:
            await ws.subscribe()
            self.ready.set()
            while True:
                message = await self._next(ws)
                if message["type"] not in ("heartbeat", "pong"):
                    self.messages.append(message)

    async def _next(self, ws: WebSocket) -> dict[str, Any]:
        while True:
            try:
                return await ws.receive()
            except trio.TooSlowError:  # while Redis is away it is quiet
                pass

    @property
    def resets(self) -> int:
        return sum(message["type"] == "reset" for message in self.messages)

    def has(self, job_id: str, version: int) -> bool:
        return any(
            message.get("jobId") == job_id and message.get("version") == version for message in reversed(self.messages)
        )

    def check(self, answered: list[tuple[str, int]], once: set[str]) -> None:
        """Nothing was lost, repeated or out of order, and everything that was answered is there."""
        texts = Counter(message["message"] for message in self.messages)
        assert {texts[text] for text in once} <= {1}  # nor was anything done twice
        assert not self.resets
        offsets = [int(message["id"].partition(":")[2]) for message in self.messages]
        assert offsets == sorted(set(offsets))
        versions: dict[str, list[int]] = {}
        for message in self.messages:
            versions.setdefault(message["jobId"], []).append(message["version"])
        for job_id, seen in versions.items():
            assert seen == list(range(1, len(seen) + 1)), job_id
        told = {(job_id, version) for job_id, seen in versions.items() for version in seen}
        assert set(answered) <= told


@asynccontextmanager
async def under_load(running: Sequence[InProcess], *, jobs: int = 8) -> AsyncIterator[tuple[list[Watcher], Any]]:
    """Publish to some jobs on all nodes, as fast as answers come, and watch on all. Checks everything at the end.

    Every job has a worker at every node, so they contend all the time.
    """
    answered: list[tuple[str, int]] = []
    once: set[str] = set()
    watchers = [Watcher() for _ in running]
    stopping = trio.Event()

    async def work(at: InProcess, job_id: str, name: str) -> None:
        count = 0
        while not stopping.is_set():
            count += 1
            text = f"{name} {job_id} {count}"
            key = text if count % 2 else None
            tries: list[int] = []
            accepted = await publish(at, job_id, key=key, tries=tries, userId=f"owner-{job_id}", message=text)
            if not accepted.duplicate:
                answered.append((job_id, accepted.version))
            if key is not None or tries == [1]:
                once.add(text)

    with trio.fail_after(3 * PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for at, watcher in zip(running, watchers, strict=True):
                nursery.start_soon(watcher.run, at)
                await watcher.ready.wait()
            async with trio.open_nursery() as workers:
                for number, at in enumerate(running):
                    for job in range(jobs):
                        workers.start_soon(work, at, f"job-{job}", f"w{number}")
                await until(lambda: len(answered) > 50)

                async def more() -> None:
                    """Return when so much has been published since that all is well again."""
                    had = [len(watcher.messages) for watcher in watchers]
                    await until(
                        lambda: all(len(each.messages) > old for each, old in zip(watchers, had, strict=True)),
                        within=RESUMED_S,
                    )
                    goal = len(answered) + 100
                    await until(lambda: len(answered) >= goal)

                yield watchers, more
                await more()
                stopping.set()
            newest: dict[str, int] = {}
            for job_id, version in answered:
                newest[job_id] = max(version, newest.get(job_id, 0))
            for watcher in watchers:
                if not watcher.resets:
                    for job_id, version in newest.items():
                        await until(partial(watcher.has, job_id, version))
                    watcher.check(answered, once)
            nursery.cancel_scope.cancel()
