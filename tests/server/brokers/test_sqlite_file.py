"""What the file of the sqlite broker has after a crash, after an older version, after every kind of change."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from protocol.notice import decode_notice
from protocol.update import Job, Private
from server.brokers import sqlite_file, sqlite_formats
from server.brokers.base import Cancel, Delete, Notify, Operation
from tests.contract.harness import Rig, publish, running
from tests.server.brokers.disks import file_of


def shown(rig: Rig) -> tuple[list[tuple[str, bytes, int, Private]], list[tuple[int, str, bytes]]]:
    """Everything that is kept."""
    jobs = sorted(rig.jobs.jobs.values(), key=lambda job: job.created)
    return (
        [(job.latest.job_id, job.latest.body, job.created, job.private) for job in jobs],
        [(update.offset, update.type, update.body) for update in rig.history.everything(0)],
    )


def crashed(path: Path, to: str) -> Path:
    """The file as a crash at this moment would leave it."""
    copy = path.with_name(to)
    for suffix in ("", "-wal"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            shutil.copyfile(source, copy.with_name(copy.name + suffix))
    return copy


def some_operations(dice: random.Random, number: int) -> list[Operation]:
    """What may come together: changes with and without an entry of their own, ends, jobs that go and come back."""
    operations: list[Operation] = []
    for _ in range(dice.randint(1, 5)):
        job_id = f"job{dice.randrange(8)}"
        match dice.randrange(8):
            case 0:
                operations.append(Delete(job_id))
            case 1:
                operations.append(Cancel(job_id, "u"))
            case 2:
                operations.append(publish(job_id, userId="u", status="completed"))
            case 3:
                operations.append(publish(job_id, attempt=number + 2))
            case 4:  # its parent changes its sums, and shows it or not
                operations.append(publish(f"part{dice.randrange(40)}", userId="u", parentId="parent", progress=50))
            case 5:
                notice, _ = decode_notice(b'{"target":"user","targetId":"u","event":"e","data":1,"store":true}')
                operations.append(Notify(notice, "app"))
            case _:
                operations.append(publish(job_id, userId="u", progress=dice.randrange(100), ttl=dice.randint(60, 90)))
    return operations


@pytest.mark.parametrize("unsettled", [3, 1000])
@pytest.mark.parametrize("seed", range(3))
async def test_a_crash_at_any_moment_loses_nothing(
    path: Path, seed: int, unsettled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_UNSETTLED_JOBS", unsettled)
    dice = random.Random(seed)
    async with running("sqlite", path, max_jobs=30) as rig:
        await rig.accept(publish("parent", userId="u"))
        for number in range(40):
            await rig.decide(*some_operations(dice, number))
            if number % 8 == 0:
                copy = crashed(path, f"copy{number}.db")
                async with running("sqlite", copy, max_jobs=30, close=False) as again:
                    assert shown(again) == shown(rig)
                    assert again.broker.epoch == rig.broker.epoch
                    assert again.broker.inboxes.places == rig.broker.inboxes.places
                file_of(again).close()
    async with running("sqlite", path, max_jobs=30) as again:
        assert shown(again) == shown(rig)


async def test_the_table_of_jobs_follows_in_larger_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "_UNSETTLED_JOBS", 5)
    monkeypatch.setattr(sqlite_file, "_UNSETTLED_ENTRIES", 20)
    async with running("sqlite", path) as rig:
        db = file_of(rig)._db

        def settled() -> tuple[int, int]:
            (rows,) = db.execute("SELECT count(*) FROM jobs").fetchone()
            (offset,) = db.execute("SELECT value FROM meta WHERE name = 'settled'").fetchone()
            return rows, int(offset)

        for number in range(5):
            await rig.accept(publish(f"job{number}", userId="u"))
        assert settled() == (0, 0)
        await rig.accept(publish("job5", userId="u"))
        assert settled() == (6, 6)
        for _ in range(20):
            await rig.accept(publish("job0"))
        assert settled() == (6, 6)
        await rig.accept(publish("job0"))
        assert settled() == (6, 27)
        await rig.accept(Delete("job1"))
        assert settled() == (6, 27)
        await rig.accept(publish("part", userId="u", parentId="job0"))  # job0 shows that it has one
        await rig.accept(publish("part", stage="s"))  # and now has other sums, or the same, but no entry
        assert settled() == (6, 31)
    db = sqlite3.connect(path)
    assert [sqlite_formats.unpack_job(state).latest.version for (state,) in db.execute("SELECT state FROM jobs")]
    db.close()


async def test_the_log_is_not_trimmed_of_what_the_table_has_not(path: Path) -> None:
    async with running("sqlite", path, max_updates=10) as rig:
        await rig.accept(publish("a", userId="u", message="first"))
        await rig.accept(publish("gone", userId="u"))
        await rig.accept(Delete("gone"))
        for number in range(10):
            await rig.decide(*[publish("b", userId="u", progress=number) for _ in range(100)])
        assert file_of(rig)._first > 3
        copy = crashed(path, "copy.db")
    async with running("sqlite", copy, max_updates=10) as again:
        assert (again.record("a")["message"], again.jobs.get("gone")) == ("first", None)
        assert again.record("b")["version"] == 1000


async def test_a_job_that_made_room_and_came_back_in_the_same_group(path: Path) -> None:
    """The first one is in no entry that says that it is gone."""
    async with running("sqlite", path, max_jobs=3) as rig:
        await rig.accept(publish("a", userId="u", status="completed", stage="first"))
        await rig.decide(publish("b", userId="u"), publish("c", userId="u"))
    async with running("sqlite", path, max_jobs=3) as rig:
        await rig.decide(publish("d", userId="u"), Delete("b"), publish("a", userId="u", stage="second"))
        assert rig.record("a")["stage"] == "second"
        before = shown(rig)
        copy = crashed(path, "copy.db")
    async with running("sqlite", copy, max_jobs=3) as rig:
        assert shown(rig) == before
        await rig.accept(Delete("a"))
        before = shown(rig)
    async with running("sqlite", copy, max_jobs=3) as rig:
        assert rig.jobs.get("a") is None
        assert shown(rig) == before


async def test_more_entries_than_a_row_has(path: Path) -> None:
    number = 2 * sqlite_formats.ENTRIES_PER_ROW + 7
    async with running("sqlite", path) as rig:
        await rig.decide(*[publish("a", userId="u", seq=n) for n in range(number)])
        (rows,) = file_of(rig)._db.execute("SELECT count(*) FROM log").fetchone()
        assert rows == 3
    async with running("sqlite", path) as again:
        assert (again.history.first, again.history.last, again.record("a")["version"]) == (1, number, number)


async def test_a_full_disk_at_the_end_loses_nothing(path: Path) -> None:
    async with running("sqlite", path) as rig:
        for number in range(50):
            await rig.accept(publish(f"job{number}", userId="u", message="m" * 2000))
        (pages,) = file_of(rig)._db.execute("PRAGMA page_count").fetchone()
        file_of(rig)._db.execute(f"PRAGMA max_page_count = {pages}")
    assert file_of(rig)._unsettled  # it could not be written
    async with running("sqlite", path) as again:
        assert shown(again) == shown(rig)


# What a version before made, with what it had in it.
SECOND_FORMAT = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE log (offset INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, type TEXT NOT NULL, job_id TEXT NOT NULL,"
    " user_id TEXT NOT NULL, kind TEXT, status TEXT NOT NULL, version INTEGER NOT NULL, urgent INTEGER NOT NULL,"
    " body BLOB NOT NULL, targets TEXT)",
    "CREATE TABLE jobs (job_id TEXT PRIMARY KEY, created INTEGER NOT NULL, offset INTEGER NOT NULL,"
    " at_ms INTEGER NOT NULL, type TEXT NOT NULL, user_id TEXT NOT NULL, kind TEXT, status TEXT NOT NULL,"
    " version INTEGER NOT NULL, urgent INTEGER NOT NULL, body BLOB NOT NULL, private BLOB NOT NULL)",
    "CREATE TABLE keys (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, fingerprint BLOB NOT NULL,"
    " job_id TEXT NOT NULL, offset INTEGER NOT NULL, version INTEGER NOT NULL, at_ms INTEGER NOT NULL)",
    "CREATE TABLE probe (filler BLOB NOT NULL)",
    "CREATE TABLE notices (offset INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, event TEXT NOT NULL,"
    " targets TEXT NOT NULL, body BLOB NOT NULL)",
    "CREATE TABLE inbox (user_id TEXT NOT NULL, offset INTEGER NOT NULL, PRIMARY KEY (user_id, offset)) WITHOUT ROWID",
    "CREATE INDEX inbox_offset ON inbox (offset)",
    "INSERT INTO meta VALUES ('schema', '2'), ('epoch', 'abcdefghijkl'), ('mark:callbacks', '2')",
)


def in_the_second_format(path: Path, rig: Rig) -> None:
    """What a rig shows, as the version before would have kept it."""
    db = sqlite3.connect(path)
    with db:
        for statement in SECOND_FORMAT:
            db.execute(statement)
        for update in rig.history.everything(0):
            targets = None if update.targets is None else msgspec.json.encode(update.targets).decode()
            row = (update.offset, update.at_ms, update.type, update.job_id, update.user_id, update.kind, update.status)
            row += (update.version, update.urgent, update.body, targets)
            db.execute(f"INSERT INTO log VALUES ({', '.join('?' * 11)})", row)
        for job in rig.jobs.jobs.values():
            latest, private = job.latest, msgspec.json.encode(job.private)
            row = (latest.job_id, job.created, latest.offset, latest.at_ms, latest.type, latest.user_id, latest.kind)
            row += (latest.status, latest.version, latest.urgent, latest.body, private)
            db.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * 12)})", row)
    db.close()


async def test_a_file_of_the_second_format_is_brought_up(path: Path, tmp_path: Path) -> None:
    notice, _ = decode_notice(b'{"target":"user","targetId":"u","event":"e","data":1}')
    async with running("memory", path) as rig:
        await rig.accept(publish("parent", userId="u"))
        await rig.accept(publish("a", userId="u", kind="k", parentId="parent", ttl=60, seq=4, progress=7))
        await rig.accept(publish("b", userId="v", status="completed"))
        await rig.accept(publish("c", userId="v"))
        await rig.accept(Delete("c"))
        await rig.accept(Notify(notice, "app"))
        in_the_second_format(path, rig)
        before = shown(rig)
        first: list[Job] = list(rig.jobs.jobs.values())
    async with running("sqlite", path) as rig:
        assert rig.broker.epoch == "abcdefghijkl"
        assert shown(rig) == before
        assert await rig.broker.load_mark("callbacks") == "2"
        for job, kept in zip(first, rig.jobs.jobs.values(), strict=True):
            assert msgspec.structs.asdict(job.latest) == msgspec.structs.asdict(kept.latest)
        assert (await rig.accept(publish("a", seq=4))).duplicate
        assert (await rig.accept(publish("a", progress=8))).offset == len(before[1]) + 1
        after = shown(rig)
    async with running("sqlite", path) as rig:
        assert shown(rig) == after


async def test_sums_that_the_second_format_had_in_one_number(path: Path) -> None:
    async with running("memory", path) as rig:
        await rig.accept(publish("p", userId="u"))
        await rig.accept(publish("q", userId="u", parentId="p", weight=1e9, progress=40))
        in_the_second_format(path, rig)
        before = shown(rig)
        private = rig.jobs.jobs["p"].private
    assert private.parts is not None
    large = msgspec.json.encode([*msgspec.structs.astuple(private)[:5], [10**15, 40 * 10**21, 1, 0, 0]])
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE jobs SET private = ? WHERE job_id = 'p'", (large,))
    async with running("sqlite", path) as rig:
        assert shown(rig) == before
        await rig.accept(publish("q", progress=60))
        assert rig.record("p")["progress"] == 60


async def test_a_file_of_the_first_format_is_brought_up(path: Path) -> None:
    async with running("memory", path) as rig:
        await rig.accept(publish("a", userId="u", progress=5))
        in_the_second_format(path, rig)
        before = shown(rig)
    db = sqlite3.connect(path)
    with db:
        for statement in (
            "DROP TABLE notices",
            "DROP TABLE inbox",
            "ALTER TABLE log DROP COLUMN targets",
            "UPDATE meta SET value = '1' WHERE name = 'schema'",
        ):
            db.execute(statement)
    db.close()
    notice, _ = decode_notice(b'{"target":"user","targetId":"u","event":"e","data":1,"store":true}')
    async with running("sqlite", path) as rig:
        assert shown(rig) == before
        assert (await rig.accept(Notify(notice, "app"))).offset == 2
    async with running("sqlite", path) as rig:
        assert [update.type for update in rig.history.everything(0)] == ["status_update", "notification"]
        assert [entry.offset for entry in rig.broker.inboxes.of_user("u")] == [2]
