"""What every broker promises of notifications, once for each store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ApiError
from protocol.notice import Notice, decode_notice, users_of
from server.brokers.base import Accepted, Acknowledge, Notify
from server.reading import missed_notices
from tests.contract.harness import Rig, publish, running
from tests.support import until


def notify(
    target: str, name: Any = None, *, store: bool = False, key: str | None = None, sub: str = "app", data: Any = 1
) -> Notify:
    """A notification as an operation."""
    message: dict[str, Any] = {"target": target, "event": "e", "data": data, "store": store}
    if name is not None:
        message["targetIds" if isinstance(name, list) else "targetId"] = name
    return Notify(notice_of(message), sub, key)


def notice_of(message: dict[str, Any]) -> Notice:
    return decode_notice(json.dumps(message).encode())[0]


async def test_it_is_an_entry_of_the_log_between_others(rig: Rig) -> None:
    first = await rig.accept(publish("a", userId="u", progress=1))
    sent = await rig.accept(notify("users", ["u", "v"], data={"x": 1}))
    second = await rig.accept(publish("a", progress=2))
    assert sent == Accepted(first.offset + 1, 0, False, False, None)
    assert second.offset == sent.offset + 1
    (entry,) = rig.history.notices(0)
    assert entry is rig.history.everything(0)[1]
    assert (entry.offset, entry.type, entry.kind) == (sent.offset, "notification", "e")
    assert (entry.job_id, entry.user_id, entry.targets) == ("", "", ("user/u", "user/v"))
    assert entry.ended
    assert entry.urgent
    body = json.loads(entry.body)
    assert list(body) == ["event", "data", "metadata", "timestamp"]
    assert (body["event"], body["data"], body["metadata"]) == ("e", {"x": 1}, {})
    # None of the jobs' business.
    assert [update.version for update in rig.history.of_job("a", 0)] == [1, 2]
    assert [update.version for update in rig.history.of_user("u", 0)] == [1, 2]
    assert list(rig.jobs.jobs) == ["a"]
    assert missed_notices(rig.history, {"user/v"}, 0) == [entry]
    assert missed_notices(rig.history, {"user/w", "client/u", "broadcast"}, 0) == []
    assert missed_notices(rig.history, {"user/v"}, sent.offset) == []


async def test_a_key_sends_once(rig: Rig) -> None:
    first = await rig.accept(notify("broadcast", key="k"))
    again = await rig.accept(notify("broadcast", key="k"))
    assert (again.offset, again.duplicate) == (first.offset, True)
    other = await rig.refuse(notify("broadcast", key="k", data=2))
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    assert not (await rig.accept(notify("broadcast", key="k", sub="another"))).duplicate
    job = await rig.refuse(publish("a", sub="app", key="k", userId="u"))
    assert job.code == "idempotency_key_reused"
    assert len(rig.history.notices(0)) == 2


async def test_repeats_at_the_same_time_count_once(rig: Rig) -> None:
    results = await rig.decide(*[notify("broadcast", key="k") for _ in range(5)])
    accepted = [result for result in results if isinstance(result, Accepted)]
    assert len({result.offset for result in accepted}) == 1
    assert [result.duplicate for result in accepted] == [False, True, True, True, True]


async def test_stored_ones_stay_until_they_are_acknowledged(rig: Rig) -> None:
    inboxes = rig.broker.inboxes
    passing = await rig.accept(notify("user", "u"))
    first = await rig.accept(notify("user", "u", store=True))
    second = await rig.accept(notify("users", ["u", "v"], store=True))
    assert [entry.offset for entry in inboxes.of_user("u")] == [first.offset, second.offset]
    assert inboxes.of_user("v") == [rig.history.everything(0)[-1]]
    assert inboxes.places == 3
    assert (await rig.accept(Acknowledge("u", passing.offset))).duplicate
    assert not (await rig.accept(Acknowledge("u", first.offset))).duplicate
    await settled(rig, 2)
    assert [entry.offset for entry in inboxes.of_user("u")] == [second.offset]
    assert (await rig.accept(Acknowledge("w", second.offset))).duplicate
    for user in ("u", "v"):
        await rig.accept(Acknowledge(user, second.offset))
    await settled(rig, 0)
    assert inboxes.bytes == 0


async def settled(rig: Rig, places: int) -> None:
    """Wait until so many places are left."""
    await until(lambda: rig.broker.inboxes.places == places)


async def test_mixed_with_updates_in_one_submission(rig: Rig) -> None:
    results = await rig.decide(
        publish("a", userId="u"), notify("user", "u", store=True), publish("a", progress=5), Acknowledge("u", 99)
    )
    assert all(isinstance(result, Accepted) for result in results)
    assert sorted(result.offset for result in results[:3] if isinstance(result, Accepted)) == [1, 2, 3]
    assert [update.type for update in rig.history.everything(0)].count("notification") == 1


@pytest.mark.parametrize("kept", ["sqlite", "redis"])
async def test_the_log_and_what_is_stored_survive(kept: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue("redis_url") if kept == "redis" else kept
    path = tmp_path / "test.db"
    async with running(store, path) as rig:
        await rig.accept(publish("a", userId="u"))
        first = await rig.accept(notify("user", "u", store=True, data="one"))
        second = await rig.accept(notify("users", ["u", "v"], store=True, data="two", key="k"))
        third = await rig.accept(notify("channels", ["c", "d"], data="three"))
        await rig.accept(Acknowledge("u", first.offset))
        before = rig.history.everything(0)
    async with running(store, path) as rig:
        after = rig.history.everything(0)
        assert [(update.offset, update.type, update.body, update.targets) for update in after] == [
            (update.offset, update.type, update.body, update.targets) for update in before
        ]
        (entry,) = rig.broker.inboxes.of_user("u")
        assert (entry.offset, json.loads(entry.body)["data"]) == (second.offset, "two")
        assert users_of(entry) == ["u", "v"]
        assert [kept.offset for kept in rig.broker.inboxes.of_user("v")] == [second.offset]
        again = await rig.accept(notify("users", ["u", "v"], store=True, data="two", key="k"))
        assert (again.offset, again.duplicate) == (second.offset, True)
        assert (await rig.accept(notify("broadcast"))).offset > third.offset
        for user in ("u", "v"):
            await rig.accept(Acknowledge(user, second.offset))
    async with running(store, path) as rig:
        assert rig.broker.inboxes.places == 0


async def test_what_is_stored_outlives_its_entry_in_the_log(store: str, tmp_path: Path) -> None:
    async with running(store, tmp_path / "test.db", max_updates=10) as rig:
        sent = await rig.accept(notify("user", "u", store=True))
        for _ in range(40):
            await rig.accept(notify("broadcast"))
        assert rig.history.first > sent.offset
        assert [entry.offset for entry in rig.broker.inboxes.of_user("u")] == [sent.offset]
    if store == "memory":
        return
    async with running(store, tmp_path / "test.db", max_updates=10) as rig:
        assert [entry.offset for entry in rig.broker.inboxes.of_user("u")] == [sent.offset]


async def test_a_user_s_oldest_go_when_there_are_too_many(store: str, tmp_path: Path) -> None:
    async with running(store, tmp_path / "test.db") as rig:
        operations = [notify("users", ["u", "v"], store=True) for _ in range(1010)]
        results = await rig.decide(*operations)
        offsets = sorted(result.offset for result in results if isinstance(result, Accepted))
        assert not any(isinstance(result, ApiError) for result in results)
        await settled(rig, 2000)
        assert [entry.offset for entry in rig.broker.inboxes.of_user("u")] == offsets[10:]
        await rig.accept(Acknowledge("v", offsets[-1]))
        await settled(rig, 1000)
    if store == "memory":
        return
    async with running(store, tmp_path / "test.db") as rig:
        assert [entry.offset for entry in rig.broker.inboxes.of_user("u")] == offsets[10:]
        assert rig.broker.inboxes.of_user("v") == []
