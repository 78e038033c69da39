"""Calls whose answers were lost: what they have done is found out, for all of them at once, and told."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import pytest
import trio.testing

from server.brokers import redis_doubts
from server.brokers.base import Accepted
from server.brokers.redis_broker import RedisBroker
from server.brokers.redis_client import Client
from server.brokers.redis_keys import Message
from tests.contract.harness import publish, running
from tests.redis_servers import RedisServer, running_proxy
from tests.support import until

pytestmark = pytest.mark.slow

COUNT = 400


@pytest.mark.parametrize("keyed", [True, False])
async def test_all_that_a_connection_has_lost_are_found_together(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    read: list[tuple[Mapping[int, int], int]] = []
    find_written = redis_doubts.find_written

    async def counted(client: Client, floors: Mapping[int, int], revs: Container[str]) -> dict[str, Message]:
        found = await find_written(client, floors, revs)
        read.append((floors, len(found)))
        return found

    monkeypatch.setattr(redis_doubts, "find_written", counted)
    async with running_proxy(redis.port) as proxy, running(f"redis://127.0.0.1:{proxy.port}", tmp_path) as rig:
        await rig.decide(*[publish("before", userId="u") for _ in range(50)])
        proxy.stop_answering()
        submissions = [
            rig.broker.submit([publish(f"job{number}", userId="u", key=f"key{number}" if keyed else None)])
            for number in range(COUNT)
        ]
        with redis.oracle() as oracle:
            await until(lambda: oracle.hlen("{statuswire}:where") == COUNT + 1)
        proxy.cut()
        proxy.pass_again()
        for submission in submissions:
            await submission.wait_kept()
        results = [submission.results[0] for submission in submissions]
        assert [isinstance(result, Accepted) and not result.duplicate for result in results] == [True] * COUNT
        assert sum(count for _, count in read) == COUNT
        assert len(read) <= COUNT // 20
        assert {floor for floors, _ in read for floor in floors.values()} == {50}  # nothing that was there before
        assert rig.broker.figures()["waiting"] == 0
        with redis.oracle() as oracle:
            assert oracle.hlen("{statuswire}:where") == COUNT + 1
            assert rig.history.last == 50 + COUNT


async def test_who_is_in_doubt_at_the_end_gets_an_answer(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(client: Client, floors: Mapping[int, int], revs: Container[str]) -> dict[str, Message]:
        searching.set()
        await trio.sleep_forever()
        raise AssertionError

    searching = trio.Event()
    monkeypatch.setattr(redis_doubts, "find_written", never)
    async with running_proxy(redis.port) as proxy:
        async with running(f"redis://127.0.0.1:{proxy.port}", tmp_path) as rig:
            await rig.accept(publish("before", userId="u"))
            proxy.stop_answering()
            submission = rig.broker.submit([publish("a", userId="u")])
            with redis.oracle() as oracle:
                await until(lambda: oracle.hlen("{statuswire}:where") == 2)
            proxy.cut()
            proxy.pass_again()
            await searching.wait()
            assert isinstance(rig.broker, RedisBroker)
        assert submission.settled
        (result,) = submission.results
        assert getattr(result, "code", None) == "store_unavailable"
        assert rig.broker.figures()["waiting"] == 0


async def test_what_others_have_put_into_a_log_is_passed_over(redis: RedisServer, tmp_path: Path) -> None:
    async with running(redis.url, tmp_path) as rig:
        assert isinstance(rig.broker, RedisBroker)
        client = rig.broker.client
        await client.call("XADD", "{statuswire}:log:3", "7-0", "m", "somebody else's")
        await client.call("XADD", "{statuswire}:log:3", "8-0", "m", b"\x98\xa1\xff")
        assert await redis_doubts.find_written(client, {3: 0}, {"x"}) == {}
