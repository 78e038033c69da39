"""Commits of the sqlite broker when the disk does not play along: what is taken back, what is in doubt, what waits."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from protocol.errors import ApiError
from protocol.notice import decode_notice
from server.brokers import sqlite
from server.brokers.base import Accepted, Delete, Notify
from server.brokers.local import Group
from server.brokers.sqlite_file import SqliteFile
from tests.contract.harness import Rig, publish, running
from tests.pacing import for_a_while
from tests.server.brokers.disks import BIG, away, file_of, fill_up, flaky, held, make_room
from tests.support import until


async def test_an_expiry_that_could_not_be_kept_is_tried_again(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u", ttl=0.4, status="processing", metadata=BIG))
        fill_up(rig)
        await until(lambda: away(rig))
        assert rig.record("a")["status"] == "processing"
        make_room(rig)
        await until(lambda: rig.record("a")["status"] == "failed")


async def test_a_full_disk_takes_back_everything_that_is_not_shown(path: Path) -> None:
    async with running("sqlite", path, max_jobs=3) as rig:
        await rig.accept(publish("a", userId="u", progress=1))
        await rig.accept(publish("old", userId="u", status="completed"))
        await rig.accept(publish("older", userId="u", status="completed"))
        fill_up(rig)
        results = []
        errors: list[ApiError | None] = []
        submissions = [
            rig.broker.submit([publish("a", progress=2, metadata=BIG, key="k")]),
            rig.broker.submit([publish("new", userId="u", metadata=BIG)]),
            rig.broker.submit([publish("a", progress=2, metadata=BIG, key="k")]),
        ]
        for submission in submissions:
            submission.when_kept(errors.append)
            results += submission.results
            with pytest.raises(ApiError) as caught:
                await submission.wait_kept()
            assert (caught.value.status, caught.value.code) == (503, "store_unavailable")
            assert caught.value.retry_after
            assert not submission.kept
        assert all(isinstance(result, Accepted) for result in results)
        assert [getattr(error, "code", None) for error in errors] == ["store_unavailable"] * 3
        assert "full" in away(rig)
        assert (rig.history.last, len(rig.delivered), sorted(rig.jobs.jobs)) == (3, 3, ["a", "old", "older"])
        epoch = rig.broker.epoch
        make_room(rig)
        again = await rig.accept(publish("a", progress=2, metadata=BIG, key="k"))
        assert (again.offset, again.version, again.duplicate) == (4, 2, False)  # offsets nobody saw are used again
        await rig.accept(publish("new", userId="u"))
        assert sorted(rig.jobs.jobs) == ["a", "new", "older"]
        assert not away(rig)
        assert (rig.broker.epoch, rig.epochs) == (epoch, [])
    async with running("sqlite", path) as rig:
        assert sorted(rig.jobs.jobs) == ["a", "new", "older"]
        assert rig.history.last == 5


async def test_a_store_that_works_again_is_noticed_without_traffic(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
        fill_up(rig)
        with pytest.raises(ApiError):
            await rig.accept(publish("a", metadata=BIG))
        await rig.broker._probe()  # type: ignore[attr-defined]
        assert away(rig)
        make_room(rig)
        await until(lambda: not away(rig))
        assert rig.history.last == 1


async def test_a_failed_commit_takes_notifications_back(path: Path) -> None:
    message = {"target": "user", "targetId": "u", "event": "e", "data": "x" * 60_000, "store": True}
    notice, _ = decode_notice(msgspec.json.encode(message))
    async with running("sqlite", path) as rig:
        await rig.accept(Notify(notice, "app", "first"))
        fill_up(rig)
        submission = rig.broker.submit([Notify(notice, "app", "second")])
        with pytest.raises(ApiError, match="full"):
            await submission.wait_kept()
        assert rig.history.last == 1
        assert rig.broker.inboxes.places == 1
        make_room(rig)
        again = await rig.accept(Notify(notice, "app", "second"))
        assert (again.offset, again.duplicate) == (2, False)
        assert rig.broker.inboxes.places == 2


async def test_what_follows_a_failing_commit_falls_with_it(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
        fill_up(rig)
        file = held(rig)
        first = rig.broker.submit([publish("a", metadata=BIG)])
        await trio.testing.wait_all_tasks_blocked()  # the commit is under way
        second = rig.broker.submit([publish("a", status="completed")])
        conflict = rig.broker.submit([publish("a", progress=1)])
        assert isinstance(conflict.results[0], ApiError)
        assert rig.broker.submit([publish("b")]).kept  # a refusal that depends on nothing in flight need not wait
        file.go.set()
        for submission in (first, second, conflict):
            with pytest.raises(ApiError, match="could not be kept"):
                await submission.wait_kept()
        make_room(rig)
        accepted = await rig.accept(publish("a", progress=1))  # the end it ran into never took place
        assert (accepted.version, accepted.offset) == (2, 2)


async def test_updates_gather_while_a_commit_is_under_way(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
        file = held(rig)
        settled: list[int] = []

        def note(progress: int, error: ApiError | None) -> None:
            settled.append(progress)

        for progress in range(1, 6):
            submission = rig.broker.submit([publish("a", progress=progress)])
            submission.when_kept(partial(note, progress))
            await trio.testing.wait_all_tasks_blocked()
            if progress == 1:  # nothing else waits yet: a repetition waits for what it repeats all the same
                rig.broker.submit([publish("a", create="must")]).when_kept(partial(note, 0))
        repeated = rig.broker.submit([publish("b", userId="u"), Delete("b")])
        assert (settled, rig.record("a")["progress"]) == ([], 0)
        file.go.set()
        await repeated.wait_kept()
        assert settled == [1, 0, 2, 3, 4, 5]
        assert rig.record("a")["progress"] == 5
        assert rig.jobs.get("b") is None
        assert rig.broker._working == {}


async def test_answers_that_wait_for_a_commit_need_none_of_their_own(path: Path) -> None:
    async with running("sqlite", path) as rig:
        file = held(rig)
        first = rig.broker.submit([publish("a", userId="u", seq=1)])
        await trio.testing.wait_all_tasks_blocked()
        repeated = rig.broker.submit([publish("a", seq=1)])
        assert not repeated.kept
        file.go.set()
        await repeated.wait_kept()
        assert first.kept
        assert (repeated.kept, rig.history.last) == (True, 1)


@pytest.mark.slow
@pytest.mark.parametrize("unreadable", [0, 1, 3])
async def test_a_commit_that_took_place_after_all_means_a_new_epoch(path: Path, unreadable: int) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u", ttl=60))
        epoch = rig.broker.epoch
        file = flaky(rig)
        file.lie, file.unreadable = True, unreadable
        with pytest.raises(ApiError, match="could not be kept"):
            await rig.accept(publish("a", progress=7))
        await until(lambda: rig.epochs)
        assert rig.epochs == [rig.broker.epoch]
        assert rig.broker.epoch != epoch
        assert (rig.history.first, rig.history.last, rig.record("a")["progress"]) == (1, 2, 7)
        await until(lambda: not away(rig))
        assert (await rig.accept(publish("a", progress=8))).version == 3
        assert len(rig.broker._leases) == 1
        new = rig.broker.epoch
    async with running("sqlite", path) as rig:
        assert (rig.broker.epoch, rig.history.last) == (new, 3)


@pytest.mark.parametrize("unreadable", [1, 2])
async def test_a_doubt_that_is_resolved_changes_nothing(path: Path, unreadable: int) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
        epoch = rig.broker.epoch
        file = flaky(rig)
        fill_up(rig)
        file.unreadable = unreadable
        for _ in range(2):
            with pytest.raises(ApiError):
                await rig.accept(publish("a", metadata=BIG))
        make_room(rig)
        assert (await rig.accept(publish("a", progress=5))).offset == 2
        assert (rig.broker.epoch, rig.epochs, away(rig)) == (epoch, [], "")


async def test_a_group_is_written_whole_or_not_at_all(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
        group = Group()
        update, job = rig.delivered[0]
        group.entries = [(msgspec.structs.replace(update, offset=2), job), (update, job)]
        with pytest.raises(sqlite3.IntegrityError):
            file_of(rig).write(group)
        assert file_of(rig).last_offset() == 1
        await rig.accept(publish("a"))


async def test_a_mistake_of_ours_is_contained_and_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SqliteFile):
        def write(self, group: Group) -> None:
            raise TypeError("a mistake")

    async with running("sqlite", path) as rig:
        file = file_of(rig)
        file.__class__ = Broken
        with pytest.raises(ApiError):
            await rig.accept(publish("a", userId="u"))
        file.__class__ = SqliteFile
        await rig.accept(publish("a", userId="u"))
    assert "TypeError: a mistake" in caplog.text


async def test_too_much_waiting_is_refused(path: Path) -> None:
    rig = Rig("sqlite", path, max_jobs=10, max_updates=100, max_age=100)
    rig.broker.max_waiting_entries = 3
    await rig.broker.start()  # nobody commits yet
    results = rig.broker.submit([publish("a", userId="u")] + [publish("a") for _ in range(4)]).results
    assert [getattr(result, "code", "accepted") for result in results] == ["accepted"] * 3 + ["overloaded"] * 2
    assert isinstance(results[4], ApiError)
    assert (results[4].status, results[4].retry_after) == (503, 1)
    rig.broker.max_waiting_entries = 100
    rig.broker.max_waiting_bytes = 10
    (refused,) = rig.broker.submit([publish("a")]).results
    assert isinstance(refused, ApiError)
    await rig.broker.close()  # commits what was accepted
    assert rig.record("a")["version"] == 3
    assert (rig.broker._waiting_entries, rig.broker._waiting_bytes) == (0, 0)


async def test_what_waits_for_the_writer_when_the_house_is_kept_is_not_forgotten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "HOUSEKEEPING_S", 0.01)
    async with running("sqlite", path) as rig:
        async with rig.broker._writing:  # as while a mark is saved
            submission = rig.broker.submit([publish("a", userId="u")])
            await for_a_while(0.1)
        await until(lambda: submission.kept)


async def test_close_commits_what_waits(path: Path) -> None:
    rig = Rig("sqlite", path, max_jobs=10, max_updates=100, max_age=100)
    await rig.broker.start()
    submission = rig.broker.submit([publish("a", userId="u")])
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.broker.close()
    assert submission.kept
    await rig.broker.close()
    async with running("sqlite", path) as again:
        assert again.record("a")["version"] == 1
