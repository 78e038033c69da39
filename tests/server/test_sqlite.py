"""The sqlite broker: what survives, and what happens when the disk does not play along."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from protocol.errors import ApiError
from protocol.notice import decode_notice
from server.brokers.base import Accepted, Cancel, Delete, Notify, StoreError
from server.brokers.local import Group
from server.brokers.sqlite import SqliteBroker
from server.brokers.sqlite_file import SqliteFile
from tests.contract.harness import Rig, publish, running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.db"


def file_of(rig: Rig) -> SqliteFile:
    assert isinstance(rig.broker, SqliteBroker)
    return rig.broker._file


def fill_up(rig: Rig) -> None:
    """From now on SQLite finds its disk full (SQLITE_FULL)."""
    (pages,) = file_of(rig)._db.execute("PRAGMA page_count").fetchone()
    file_of(rig)._db.execute(f"PRAGMA max_page_count = {pages}")


def make_room(rig: Rig) -> None:
    file_of(rig)._db.execute("PRAGMA max_page_count = 1000000")


def away(rig: Rig) -> str:
    """Why the store is away, or nothing."""
    return rig.broker.available or ""


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the server's own tasks and threads bring about; a turn of the loop at a time."""
    while not condition():
        await trio.testing.wait_all_tasks_blocked(0.005)


BIG = {"filler": "x" * 60_000}


async def test_a_restart_loses_nothing(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("p", userId="u", kind="export"))
        await rig.accept(publish("a", userId="u", parentId="p", weight=3, ttl=60, seq=4, key="k"))
        await rig.accept(publish("b", userId="u", parentId="p", status="completed"))
        await rig.accept(publish("c", userId="v"))
        await rig.accept(Cancel("a", "u"))
        await rig.accept(Delete("c"))
        before = rig
    async with running("sqlite", path) as rig:
        assert rig.delivered == []
        assert rig.broker.epoch == before.broker.epoch
        assert (rig.history.first, rig.history.last) == (1, before.history.last)
        assert [
            (u.offset, u.at_ms, u.type, u.job_id, u.user_id, u.kind, u.status, u.version, u.body, u.ended, u.urgent)
            for u in rig.history.everything(0)
        ] == [
            (u.offset, u.at_ms, u.type, u.job_id, u.user_id, u.kind, u.status, u.version, u.body, u.ended, u.urgent)
            for u, _ in before.delivered
        ]
        assert list(rig.jobs.jobs) == ["p", "a", "b"]
        for name, job in before.jobs.jobs.items():
            again = rig.jobs.get(name)
            assert again is not None
            assert (again.latest.body, again.created, again.private) == (job.latest.body, job.created, job.private)
        assert rig.jobs.get("b").latest is rig.history.of_job("b", 0)[-1]  # type: ignore[union-attr]
        assert (await rig.accept(publish("a", seq=4))).duplicate
        first = await rig.accept(publish("a", userId="u", parentId="p", weight=3, ttl=60, seq=4, key="k"))
        assert (first.duplicate, first.offset, first.cancel_requested) == (True, 2, True)
        accepted = await rig.accept(publish("a", progress=40))
        assert accepted.offset == before.history.last + 1
        assert rig.record("p")["progress"] == 55
        assert len(rig.broker._leases) == 1


async def test_leases_begin_anew_after_a_restart(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u", ttl=0.3, status="processing"))
    started = trio.current_time()
    async with running("sqlite", path) as rig:
        with trio.fail_after(5):
            await until(lambda: rig.record("a")["status"] == "failed")
    assert trio.current_time() - started >= 0.6


async def test_an_expiry_that_could_not_be_kept_is_tried_again(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u", ttl=0.1, status="processing", metadata=BIG))
        fill_up(rig)
        with trio.fail_after(5):
            await until(lambda: bool(away(rig)))
        assert rig.record("a")["status"] == "processing"
        make_room(rig)
        with trio.fail_after(5):
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
        with trio.fail_after(5):
            await until(lambda: not away(rig))
        assert rig.history.last == 1


class Held(SqliteFile):
    """A disk that takes its time: a write ends only when the test says so."""

    go: threading.Event

    def write(self, group: Group) -> None:
        self.go.wait(10)
        super().write(group)


async def test_what_follows_a_failing_commit_falls_with_it(path: Path) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
        fill_up(rig)
        file = file_of(rig)
        file.__class__ = Held
        assert isinstance(file, Held)
        file.go = threading.Event()
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
        file = file_of(rig)
        file.__class__ = Held
        assert isinstance(file, Held)
        file.go = threading.Event()
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


class Flaky(SqliteFile):
    """A disk that says it failed though the commit took place; then is unreadable for a while."""

    unreadable = 0
    lie = False

    def write(self, group: Group) -> None:
        super().write(group)
        if self.lie:
            self.lie = False
            raise sqlite3.OperationalError("disk I/O error")

    def last_offset(self) -> int:
        if self.unreadable:
            self.unreadable -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return super().last_offset()


@pytest.mark.slow
@pytest.mark.parametrize("unreadable", [0, 1, 3])
async def test_a_commit_that_took_place_after_all_means_a_new_epoch(path: Path, unreadable: int) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u", ttl=60))
        epoch = rig.broker.epoch
        file = file_of(rig)
        file.__class__ = Flaky
        assert isinstance(file, Flaky)
        file.lie, file.unreadable = True, unreadable
        with pytest.raises(ApiError, match="could not be kept"):
            await rig.accept(publish("a", progress=7))
        with trio.fail_after(10):
            await until(lambda: bool(rig.epochs))
        assert rig.epochs == [rig.broker.epoch]
        assert rig.broker.epoch != epoch
        assert (rig.history.first, rig.history.last, rig.record("a")["progress"]) == (1, 2, 7)
        with trio.fail_after(5):
            await until(lambda: not away(rig))
        assert (await rig.accept(publish("a", progress=8))).version == 3
        assert len(rig.broker._leases) == 1
        new = rig.broker.epoch
    async with running("sqlite", path) as rig:
        assert (rig.broker.epoch, rig.history.last) == (new, 3)


async def test_answers_that_wait_for_a_commit_need_none_of_their_own(path: Path) -> None:
    async with running("sqlite", path) as rig:
        file = file_of(rig)
        file.__class__ = Held
        assert isinstance(file, Held)
        file.go = threading.Event()
        first = rig.broker.submit([publish("a", userId="u", seq=1)])
        await trio.testing.wait_all_tasks_blocked()
        repeated = rig.broker.submit([publish("a", seq=1)])
        assert not repeated.kept
        file.go.set()
        await repeated.wait_kept()
        assert first.kept
        assert (repeated.kept, rig.history.last) == (True, 1)


@pytest.mark.parametrize("unreadable", [1, 2])
async def test_a_doubt_that_is_resolved_changes_nothing(path: Path, unreadable: int) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
        epoch = rig.broker.epoch
        file = file_of(rig)
        file.__class__ = Flaky
        assert isinstance(file, Flaky)
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


async def test_closing_what_never_started() -> None:
    rig = Rig("sqlite", Path("nowhere/at/all"), max_jobs=10, max_updates=100, max_age=100)
    with pytest.raises(StoreError, match="does not exist"):
        await rig.broker.start()
    await rig.broker.close()


async def test_a_lowered_bound_of_jobs_holds_from_the_start(path: Path) -> None:
    async with running("sqlite", path) as rig:
        for name, status in (("a", "completed"), ("b", "processing"), ("c", "failed"), ("d", "queued")):
            await rig.accept(publish(name, userId="u", status=status))
        await rig.accept(publish("a", attempt=2))
        await rig.accept(publish("a", status="completed"))  # so c ended first
    async with running("sqlite", path, max_jobs=3) as rig:
        assert sorted(rig.jobs.jobs) == ["a", "b", "d"]
    async with running("sqlite", path, max_jobs=1) as rig:
        assert sorted(rig.jobs.jobs) == ["b", "d"]
        assert (await rig.refuse(publish("e", userId="u"))).code == "too_many_jobs"


async def test_the_log_is_trimmed_by_count(path: Path) -> None:
    async with running("sqlite", path, max_updates=50) as rig:
        await rig.accept(publish("a", userId="u"))
        for _ in range(8):
            await rig.decide(*[publish("a") for _ in range(60)])
        count = sum(1 for _ in file_of(rig).entries(1))
        assert count < 50 + 256 + 60 + 1
        assert len(rig.history) == 50
    async with running("sqlite", path, max_updates=50) as rig:
        assert (rig.history.first, rig.history.last) == (432, 481)


async def test_the_log_and_the_keys_are_trimmed_by_age(path: Path) -> None:
    async with running("sqlite", path, max_age=100) as rig:
        rig.broker._clock = lambda: 1000.0
        for number in range(20):
            await rig.accept(publish("a", userId="u", key=f"k{number}"))
        rig.broker._clock = lambda: 5000.0
        file_of(rig)._trimmed_at = 0
        await rig.accept(publish("a"))
        db = file_of(rig)._db
        assert db.execute("SELECT min(last), max(last) FROM log").fetchone() == (21, 21)
        assert db.execute("SELECT count(*) FROM keys").fetchone() == (0,)
        rig.broker._clock = lambda: 9000.0
        rig.broker._housekeep()
        assert (rig.history.first, rig.history.last) == (22, 21)
    async with running("sqlite", path, max_age=100) as rig:  # the newest entry stays, and with it the position
        assert (rig.history.first, rig.history.last) == (22, 21)
        assert (await rig.accept(publish("a"))).offset == 22


async def test_a_log_without_its_end_is_a_new_epoch(path: Path) -> None:
    async with running("sqlite", path) as rig:
        for _ in range(5):
            await rig.accept(publish("a", userId="u"))
        epoch = rig.broker.epoch
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM log WHERE last > 3")
    db.close()
    async with running("sqlite", path) as rig:
        assert rig.broker.epoch != epoch
        assert (rig.history.first, rig.history.last) == (6, 5)
        assert (await rig.accept(publish("a"))).offset == 6


async def test_a_log_with_a_hole_is_kept_from_there_on(path: Path) -> None:
    async with running("sqlite", path) as rig:
        for _ in range(5):
            await rig.accept(publish("a", userId="u"))
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM log WHERE last = 3")
    db.close()
    async with running("sqlite", path) as rig:
        assert (rig.history.first, rig.history.last) == (4, 5)


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


async def test_one_server_per_file(path: Path) -> None:
    async with running("sqlite", path) as rig:
        second = Rig("sqlite", path, max_jobs=10, max_updates=100, max_age=100)
        with pytest.raises(StoreError, match="in use by another server"):
            await second.broker.start()
        await rig.accept(publish("a", userId="u"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"not a database at all, " * 100), "damaged or no database"),
        (lambda path: path.mkdir(), "cannot be written"),
        (lambda path: _tables(path, "CREATE TABLE other (x)"), "another application"),
        (lambda path: _ours(path, "UPDATE meta SET value = '99' WHERE name = 'schema'"), "format 99"),
        (lambda path: _ours(path, "DELETE FROM meta WHERE name = 'epoch'"), "no epoch"),
        (lambda path: _ours(path, "UPDATE jobs SET state = x'00'"), "damaged"),
    ],
)
async def test_an_unusable_file_says_why(path: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    made = make(path)
    if made is not None and hasattr(made, "__await__"):
        await made
    rig = Rig("sqlite", path, max_jobs=10, max_updates=100, max_age=100)
    with pytest.raises(StoreError, match=words) as caught:
        await rig.broker.start()
    assert str(caught.value).startswith("store.url: ")


def _tables(path: Path, sql: str) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute(sql)
    db.close()


async def _ours(path: Path, sql: str) -> None:
    async with running("sqlite", path) as rig:
        await rig.accept(publish("a", userId="u"))
    _tables(path, sql)


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * 10 :] = b"\xff" * (len(data) - 4096 * 10)
    path.write_bytes(bytes(data))


async def test_a_damaged_page_is_found_at_the_start(path: Path) -> None:
    async with running("sqlite", path) as rig:
        for number in range(200):
            await rig.accept(publish(f"job{number}", userId="u", message="m" * 1000))
    _damage(path)
    rig = Rig("sqlite", path, max_jobs=10, max_updates=100, max_age=100)
    with pytest.raises(StoreError, match="damaged"):
        await rig.broker.start()


@pytest.mark.parametrize("name", ["", ":memory:"])
async def test_a_file_needs_a_name(name: str) -> None:
    with pytest.raises(StoreError, match="names no file"):
        SqliteFile(name, max_updates=1, max_age=1).open("epoch")


def test_unforeseen_errors_are_passed_on() -> None:
    error = SqliteFile("x.db", max_updates=1, max_age=1)._unusable(sqlite3.OperationalError("disk I/O error"))
    assert "disk I/O error" in str(error)


WRITER = """
import sys, trio
from pathlib import Path
from tests.contract.harness import publish, running

async def main(path):
    async with running("sqlite", Path(path)) as rig:
        number = 0
        while True:
            number += 1
            accepted = await rig.accept(publish("a", userId="u", seq=number, key=f"k{number}"))
            sys.stdout.write(f"{rig.broker.epoch} {accepted.offset}\\n")
            sys.stdout.flush()

trio.run(main, sys.argv[1])
"""


async def test_kill_right_after_an_answer_loses_nothing(path: Path) -> None:
    root = Path(__file__).parents[2]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    data = b""
    with trio.fail_after(30):
        while data.count(b"\n") < 40:
            piece = await process.stdout.receive_some()
            assert piece, "the writer ended by itself"
            data += piece
        process.send_signal(signal.SIGKILL)
        await process.wait()
        while piece := await process.stdout.receive_some():  # what was answered before the signal arrived
            data += piece
    await process.stdout.aclose()
    epoch, answered = data[: data.rindex(b"\n")].decode().splitlines()[-1].split()
    last = int(answered)
    async with running("sqlite", path) as rig:
        assert rig.broker.epoch == epoch
        assert rig.history.last in (last, last + 1)  # at most one was kept and not yet answered
        assert rig.record("a")["version"] == rig.history.last
        assert (await rig.accept(publish("a", seq=last))).duplicate
        repeated = await rig.accept(publish("a", userId="u", seq=last, key=f"k{last}"))
        assert (repeated.duplicate, repeated.offset) == (True, last)
        assert (await rig.accept(publish("a"))).offset == rig.history.last
