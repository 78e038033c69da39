"""The sqlite broker anew on the same file: what survives, what is trimmed, and files that cannot be used."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from server.brokers.base import Cancel, Delete, StoreError
from server.brokers.sqlite_file import SqliteFile
from tests.contract.harness import Rig, publish, running
from tests.server.brokers.disks import file_of
from tests.support import PATIENCE_S, ROOT, until


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
        await until(lambda: rig.record("a")["status"] == "failed")
    assert trio.current_time() - started >= 0.6


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
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    data = b""
    with trio.fail_after(PATIENCE_S):
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


async def test_closing_what_never_started() -> None:
    rig = Rig("sqlite", Path("nowhere/at/all"), max_jobs=10, max_updates=100, max_age=100)
    with pytest.raises(StoreError, match="does not exist"):
        await rig.broker.start()
    await rig.broker.close()
