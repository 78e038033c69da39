"""Simulated workers that publish made-up jobs over plain HTTP, for `make run`, screenshots and trying things out.

Every kind of job shows one thing the server does: steps and a computed time left, a parent that rolls up its parts,
a failure with a second attempt, a worker that goes silent (a lease runs out), work of unknown length, and workers
that stop when somebody cancels their job.

The workers go through the public API alone. Each update carries a `seq`, so one that was sent again because its
answer got lost counts once; while the server is away they wait and then go on where they were.

Run: python tools/demo.py [--url http://127.0.0.1:3000] [--speed 1.0]
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import trio

OWNERS = ("alice", "bob", "carol")
# A lease some updates long: one that is late does no harm, a dead worker shows within seconds.
TTL_S = 12.0
# The lease of the worker that goes silent.
LEASE_S = 4.0
# Ended jobs beyond these are deleted again: the demo may run for weeks.
KEPT = 80
LONGEST_PAUSE_S = 5.0

Record: TypeAlias = dict[str, Any]


class Refused(Exception):
    """The server does not want this job any more: deleted, ended by somebody else, or its lease is over."""


class Cancelled(Exception):
    """Somebody asked for the job to be cancelled."""


class Fatal(Exception):
    """Nothing that trying again would mend, in words for the terminal."""


@dataclass
class Api:
    """The server, as a worker sees it.

    Attributes:
        client: knows the address.
        speed: how many times faster than real time the workers live.
        ended: ids of ended jobs, oldest first.
    """

    client: httpx.AsyncClient
    speed: float
    ended: deque[str] = field(default_factory=deque)
    away: bool = False
    renewing: trio.Lock = field(default_factory=trio.Lock)

    async def pause(self, seconds: float) -> None:
        """Work, simulated."""
        await trio.sleep(seconds * random.uniform(0.6, 1.4) / self.speed)

    async def call(self, method: str, path: str, body: Record | None = None, key: str | None = None) -> Record:
        """Send one request, again and again while the server is away or busy.

        Raises:
            Refused: 404 or 409.
            Fatal: any other 4xx, which would be the demo's own mistake.
        """
        headers = {"Idempotency-Key": key} if key else {}
        pause = 0.25
        renewed = False
        while True:
            why: str
            token = self.client.headers.get("Authorization")
            try:
                response = await self.client.request(method, path, json=body, headers=headers)
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            else:
                if response.status_code < 400:
                    self._report("")
                    return response.json() if response.content else {}
                why = _complaint(response)
                if response.status_code in (404, 409):
                    raise Refused(why)
                if response.status_code == 401 and not renewed:
                    await self._renew_token(token, why)
                    renewed = True
                    continue
                if response.status_code not in (429, 500, 502, 503, 504):
                    raise Fatal(f"{method} {path}: {why}")
            self._report(why)
            await trio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _report(self, why: str) -> None:
        if bool(why) != self.away:
            self.away = bool(why)
            print(f"demo: {f'waiting for the server ({why})' if why else 'publishing'}", file=sys.stderr, flush=True)

    async def _renew_token(self, refused: str | None, why: str) -> None:
        """Sign a token with the key this machine's server is configured with, unless another worker just did."""
        async with self.renewing:
            if self.client.headers.get("Authorization") != refused:
                return
            command = Path(sys.executable).with_name("statuswire")
            arguments = [str(command), "token", "--sub", "demo", "--capability", "publish", "--ttl", "3600"]
            try:
                done = await trio.run_process(arguments, capture_stdout=True, capture_stderr=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", b"") or b""
                raise Fatal(f"{why}; set STATUSWIRE_TOKEN ({said.decode().strip() or error})") from None
            self.client.headers["Authorization"] = f"Bearer {done.stdout.decode().strip()}"


def _complaint(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"


@dataclass
class Work:
    """One job in a worker's hands.

    Attributes:
        seq: number of the last update of this attempt.
        stop: set when the whole that this job is a part of was cancelled.
    """

    api: Api
    job_id: str
    seq: int = 0
    attempt: int = 1
    stop: trio.Event = field(default_factory=trio.Event)

    async def say(self, **fields: object) -> None:
        """Publish one update.

        Raises:
            Cancelled: the answer to news of progress says that somebody asked for it.
            Refused: the job is no longer ours to update.
        """
        self.seq += 1
        update = {"seq": self.seq, "attempt": self.attempt, "ttl": TTL_S} | fields
        answer = await self.api.call("POST", f"api/v2/jobs/{self.job_id}/updates", update)
        if fields.get("status") == "processing" and (answer.get("cancelRequested") or self.stop.is_set()):
            raise Cancelled

    async def retry(self) -> None:
        """Begin the next attempt; `seq` counts anew in it."""
        self.attempt += 1
        self.seq = 0
        await self.say(status="processing", progress=0, stage="again", message="second attempt")

    async def count(self, total: int, pause: float, stage: str, operation: str, share: tuple[int, int]) -> None:
        """Do ``total`` steps, which take the progress from ``share[0]`` to ``share[1]`` percent."""
        start, end = share
        for done in range(1, total + 1):
            await self.api.pause(pause)
            await self.say(
                status="processing",
                stage=stage,
                currentOperation=operation.format(done=done, total=total),
                steps={"done": done, "total": total, "current": f"{stage}-{done}"},
                progress=round(start + (end - start) * done / total, 1),
            )


@asynccontextmanager
async def job(api: Api, kind: str, owner: str | None = None, **fields: object) -> AsyncIterator[Work]:
    """Create a job, and end it properly when it is cancelled inside."""
    job_id = f"{kind}-{secrets.token_hex(3)}"
    created = {"jobId": job_id, "userId": owner or random.choice(OWNERS), "kind": kind, "status": "queued"} | fields
    await api.call("POST", "api/v2/jobs", created, key=job_id)
    work = Work(api, job_id)
    try:
        yield work
    except Cancelled:
        await work.say(status="cancelled", message="stopped by request")
    finally:
        api.ended.append(job_id)


async def export(api: Api) -> None:
    """Steps with a known total: the server works out the time left."""
    async with job(api, "export", metadata={"format": random.choice(["pdf", "csv", "xlsx"])}) as work:
        await api.pause(1.5)
        await work.say(status="processing", stage="preparing", workerId=f"worker_{random.randint(1, 6)}", progress=0)
        await work.count(random.randint(20, 60), 0.5, "pages", "Processing page {done}/{total}", (0, 95))
        await api.pause(1)
        await work.say(status="completed", message="ready to download", result={"bytes": random.randint(10**5, 10**7)})


async def video(api: Api) -> None:
    """Stages of different length."""
    async with job(api, "video") as work:
        await work.count(4, 0.7, "download", "Fetching part {done} of {total}", (0, 15))
        await work.count(25, 0.9, "transcode", "Encoding segment {done}/{total}", (15, 85))
        await work.count(6, 0.4, "upload", "Uploading rendition {done}/{total}", (85, 99))
        await work.say(status="completed", message="published")


async def flaky_import(api: Api) -> None:
    """Fails in the middle, then a second attempt of the same job goes through."""
    async with job(api, "import") as work:
        failing = random.randint(5, 9)
        await work.count(failing, 0.7, "rows", "Importing block {done}", (0, 5 * failing))
        await work.say(status="failed", error="the other side closed the connection")
        await api.pause(6)
        await work.retry()
        await work.count(16, 0.6, "rows", "Importing block {done}/{total}", (0, 100))
        await work.say(status="completed", message="second attempt went through")


async def report(api: Api) -> None:
    """A parent whose progress and end follow from its parts; with luck all of them succeed."""
    owner = random.choice(OWNERS)
    stop = trio.Event()
    turns = trio.Semaphore(3)
    async with job(api, "report", owner, autoComplete=True) as parent, trio.open_nursery() as nursery:
        nursery.start_soon(preside, api, parent, stop)
        async with trio.open_nursery() as chapters:
            for number in range(1, random.randint(5, 8)):
                chapters.start_soon(chapter, api, turns, stop, parent.job_id, owner, number)
        nursery.cancel_scope.cancel()  # its parts have ended it


async def preside(api: Api, parent: Work, stop: trio.Event) -> None:
    """Say that the whole is worked on, until somebody asks for it to be cancelled."""
    with suppress(Refused):  # its parts may end it at any moment
        try:
            while True:
                await parent.say(status="processing", stage="chapters")
                await api.pause(3)
        except Cancelled:
            await parent.say(status="cancelled", message="stopped by request")
            stop.set()


async def chapter(api: Api, turns: trio.Semaphore, stop: trio.Event, parent_id: str, owner: str, number: int) -> None:
    """One part of a report."""
    weight = random.choice([1, 1, 2])
    part = job(api, "chapter", owner, parentId=parent_id, weight=weight)
    with suppress(Refused):
        async with part as work, turns:
            work.stop = stop
            await work.count(6 * weight, 0.8, f"chapter {number}", "Drawing figure {done}/{total}", (0, 100))
            await end_chapter(work)


async def end_chapter(work: Work) -> None:
    """Most figures have data."""
    if random.random() < 0.08:
        await work.say(status="failed", error="a figure has no data")
    else:
        await work.say(status="completed")


async def silent(api: Api) -> None:
    """A worker that dies: its lease runs out, and the server says `stalled`, then `failed`."""
    async with job(api, "crawl") as work:
        await work.count(8, 0.6, "fetch", "Crawling site {done}", (0, 30))
        await work.say(ttl=LEASE_S)
        await trio.sleep(1.5 * LEASE_S)  # in real time, as leases are
        if random.random() < 0.5:  # sometimes it was merely slow
            await work.count(10, 0.5, "fetch", "Crawling site {done}, after a pause", (30, 100))
            await work.say(status="completed", message="slow, but done")


async def endless(api: Api) -> None:
    """Work whose length nobody knows: no progress, only words."""
    async with job(api, "index") as work:
        for number in range(random.randint(10, 30)):
            await work.say(status="processing", stage="scanning", currentOperation=f"{number * 137} documents so far")
            await api.pause(1.2)
        await work.say(status="completed", message="index is fresh")


Scene: TypeAlias = Callable[[Api], Awaitable[None]]
# More of what is usual, less of what is rare.
SCENES: tuple[tuple[Scene, int], ...] = (
    (export, 4),
    (video, 3),
    (flaky_import, 2),
    (report, 2),
    (silent, 1),
    (endless, 2),
)


async def worker(api: Api, first: Scene) -> None:
    """Do one job after the other, for ever."""
    scene = first
    while True:
        with suppress(Refused):  # the job was deleted or ended under the worker's hands: nothing is left to do
            await scene(api)
        while len(api.ended) > KEPT:
            with suppress(Refused):
                await api.call("DELETE", f"api/v2/jobs/{api.ended.popleft()}")
        await api.pause(2)
        (scene,) = random.choices([scene for scene, _ in SCENES], [weight for _, weight in SCENES])


async def publish(url: str, speed: float) -> None:
    """Run one worker per scene against the server at ``url``."""
    token = os.environ.get("STATUSWIRE_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=url.rstrip("/") + "/", headers=headers, timeout=15) as client:
        api = Api(client, speed)
        async with trio.open_nursery() as nursery:
            for scene, _ in SCENES:
                nursery.start_soon(worker, api, scene)


async def follow(speed: float) -> None:
    """Take the address from the server's start line on standard input, and stop when that is closed."""
    start_line = await _read_line()
    print(start_line, end="", flush=True)
    words = start_line.replace(",", " ").split()
    url = next((word for word in words if word.startswith(("http://", "https://"))), None)
    if url is None:
        if start_line:
            raise Fatal("the server's start line names no address")
        return  # it did not start, and said why itself
    print(f"Open {url} in a browser: a demo publishes jobs there. Ctrl-C ends both.", flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish, url, speed)
        while line := await _read_line():
            print(line, end="", flush=True)
        nursery.cancel_scope.cancel()


async def _read_line() -> str:
    # Abandoned, because a read of a pipe cannot be interrupted and must not hold up an error's message.
    return await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Publish made-up jobs.")
    parser.add_argument("--url", default=os.environ.get("STATUSWIRE_URL", "http://127.0.0.1:3000"))
    parser.add_argument("--speed", type=float, default=1.0, help="how many times faster than real work (default 1)")
    parser.add_argument("--follow", action="store_true", help="read the address from a server's output, end with it")
    arguments = parser.parse_args()
    run = partial(follow, arguments.speed) if arguments.follow else partial(publish, arguments.url, arguments.speed)
    problem = None
    try:
        trio.run(run)
    except* KeyboardInterrupt:
        pass
    except* Fatal as group:
        problem = next(_leaves(group))
    if problem is not None:
        sys.exit(f"demo: {problem}")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group that nurseries made."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


if __name__ == "__main__":
    main()
