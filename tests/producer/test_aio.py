"""The same for asyncio and trio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from statuswire import Client, aio
from tests.producer.workers import record, settled, worker
from tests.support import Address, server

Program = Callable[[Client], Awaitable[None]]


async def in_trio(program: Program, client: Client) -> None:
    await program(client)


async def in_asyncio(program: Program, client: Client) -> None:
    async def main() -> None:
        await program(client)

    await trio.to_thread.run_sync(lambda: asyncio.run(main()))


@pytest.fixture(params=[in_trio, in_asyncio])
def run(request: pytest.FixtureRequest) -> Callable[[Program, Client], Awaitable[None]]:
    found: Callable[[Program, Client], Awaitable[None]] = request.param
    return found


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def program(client: Client) -> None:
    async with aio.job("a", user="u", client=client) as j:
        j.progress(45, "half", stage="s")
        assert not j.cancel_requested
        assert j.id == "a"
    async with aio.job("b", user="u", client=client) as j:
        await j.complete({"rows": 1}, "done")
    with pytest.raises(ValueError, match="x"):
        async with aio.job("c", user="u", client=client):
            raise ValueError("x")
    async with aio.job("d", user="u", client=client) as j:
        await j.fail("no")
    async with aio.job("e", user="u", client=client) as j:
        await j.cancel("stop")
    aio.create_task("f", user="u", client=client)
    aio.update_task("f", 10, client=client)
    await aio.complete_task("f", {"rows": 2}, client=client)
    await aio.fail_task("g", "no", user="u", client=client)
    await aio.cancel_task("h", "stop", user="u", client=client)
    await aio.publish({"jobId": "i", "userId": "u", "status": "completed"}, client=client)
    assert [item async for item in aio.track([1, 2], "k", user="u", client=client)] == [1, 2]
    assert [item async for item in aio.track(numbers(3), "l", total=3, user="u", client=client)] == [0, 1, 2]
    async with aclosing(aio.track(range(9), "m", user="u", client=client)) as items:  # type: ignore[type-var]
        async for item in items:
            if item == 2:
                break
    async with aio.job("n", user="u", client=client) as j:
        assert [item async for item in j.track(range(2))] == [0, 1]
    assert await aio.flush(20, client=client)


async def test_everything(run: Callable[[Program, Client], Awaitable[None]], tmp_path: Path) -> None:
    async with server() as at, worker(at.url, tmp_path) as client:
        await run(program, client)
        expected = (
            dict.fromkeys("abfikln", "completed") | dict.fromkeys("cdg", "failed") | dict.fromkeys("ehm", "cancelled")
        )
        assert {name: (await record(at, name))["status"] for name in expected} == expected
        assert (await record(at, "l"))["steps"] == {"done": 3, "total": 3}
        assert (await record(at, "m"))["message"] == "left after 2 of 9"


async def cancelled_status(at: Address, client: Client) -> tuple[str, str]:
    await settled(client)
    found = await record(at, "a")
    return found["status"], found["error"]


async def test_a_cancelled_trio_task_cancels_its_job() -> None:
    async with server() as at, worker(at.url) as client:
        with trio.CancelScope() as scope:
            async with aio.job("a", user="u", client=client):
                scope.cancel()
                await trio.sleep_forever()
        assert await cancelled_status(at, client) == ("cancelled", "Cancelled")


async def test_a_cancelled_asyncio_task_cancels_its_job() -> None:
    async def main(client: Client) -> None:
        begun = asyncio.Event()

        async def work() -> None:
            async with aio.job("a", user="u", client=client):
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with server() as at, worker(at.url) as client:
        await trio.to_thread.run_sync(lambda: asyncio.run(main(client)))
        assert await cancelled_status(at, client) == ("cancelled", "CancelledError")


async def test_what_waits_for_the_disk_does_not_hold_up_the_loop() -> None:
    async with server() as at, worker(at.url) as client:
        seen: list[str] = []
        end = client.end
        client.end = lambda *arguments: (seen.append(threading.current_thread().name), end(*arguments))[1]  # type: ignore[method-assign]
        async with aio.job("a", user="u", client=client):
            pass
        await settled(client)
        assert seen
        assert seen[0] != threading.main_thread().name
