"""The embedded store is killed at any moment under load, again and again on one file: what was answered is there.

`KILLS=200 pytest tests/server/brokers/test_sqlite_kills.py` for longer than `make test` does it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import trio

from tests.contract.harness import running
from tests.pacing import for_a_while
from tests.support import PATIENCE_S, ROOT

pytestmark = pytest.mark.slow

# Publishes answered before a process may be killed.
DONE = 60
KILLS = int(os.environ.get("KILLS", "4"))
WORKERS = 12

# Each worker has one operation under way at a time, on jobs of its own: it says what it begins, and what came of it.
# The bounds are so low that settling, trimming and making room happen all the time.
WRITER = """
import random, sys, trio
from pathlib import Path
from protocol.errors import ApiError
from server.brokers import sqlite_file
from server.brokers.base import Delete
from tests.contract.harness import publish, running

sqlite_file._UNSETTLED_JOBS, sqlite_file._UNSETTLED_ENTRIES = 20, 150
sqlite_file.ENTRIES_PER_ROW, sqlite_file._TRIM_EVERY_S = 4, 0.05
sqlite_file._TRIM_SLACK, sqlite_file._TRIM_STEP = 20, 50

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

async def work(rig, worker, life):
    generator = random.Random(f"{life} {worker}")
    number = 0
    while True:
        number += 1
        job_id = f"w{worker}.{generator.randrange(4)}"
        text = f"{life}.{number}"
        known = rig.jobs.get(job_id)
        if known is not None and generator.random() < 0.2:
            operation, said = Delete(job_id), "gone"
        else:
            status = generator.choice(["processing", "processing", "completed"])
            again = {"attempt": rig.record(job_id)["attempt"] + 1} if known is not None and known.latest.ended else {}
            key = f"{worker}.{text}" if generator.random() < 0.3 else None
            operation = publish(job_id, userId="u", status=status, message=text, key=key, **again)
            said = text + "!" * (status == "completed")
        say("begin", job_id, said)
        (result,) = await rig.decide(operation)
        if isinstance(result, ApiError):
            say("refused", job_id, result.code)
        else:
            say("done", job_id, said, result.offset)

async def main(path, life):
    async with running("sqlite", Path(path), max_jobs=40, max_updates=100) as rig:
        say("epoch", rig.broker.epoch)
        async with trio.open_nursery() as nursery:
            for worker in range(WORKERS):
                nursery.start_soon(work, rig, worker, life)

trio.run(main, sys.argv[1], sys.argv[2])
""".replace("WORKERS", str(WORKERS))


async def one_life(path: Path, life: int, seconds: float) -> list[str]:
    """What a process said before it was killed."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", WRITER, str(path), str(life)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    data = b""
    with trio.fail_after(PATIENCE_S):
        while b" gone" not in data or data.count(b"done ") < DONE:  # it is at it
            piece = await process.stdout.receive_some()
            assert piece, "the writer ended by itself"
            data += piece
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await for_a_while(seconds)
                process.send_signal(signal.SIGKILL)

            nursery.start_soon(kill)
            while piece := await process.stdout.receive_some():
                data += piece
        await process.wait()
    await process.stdout.aclose()
    return data[: data.rindex(b"\n")].decode().splitlines()


async def test_killed_at_any_moment(path: Path) -> None:
    generator = random.Random(KILLS)
    may_be: dict[str, set[str]] = {}  # of each job, what its newest state can be; it has ended if that ends in "!"
    epochs: set[str] = set()
    counts: Counter[str] = Counter()
    last = 0
    for life in range(KILLS):
        for line in await one_life(path, life, generator.uniform(0, 0.3)):
            what, name, *rest = line.split(" ")
            counts[what] += 1
            if what == "epoch":
                epochs.add(name)
            elif what == "begin":
                may_be.setdefault(name, {"gone"}).add(rest[0])
            elif what == "done":
                may_be[name] = {rest[0]}
                last = max(last, int(rest[1]))
            elif rest[0] == "job_not_found":  # it has made room for another one
                may_be[name] = {"gone"}
            else:
                assert rest[0] == "too_many_jobs"
        async with running("sqlite", path, max_jobs=40, max_updates=100) as rig:
            assert rig.history.last >= last
            for update in rig.history.everything(0):
                job = rig.jobs.get(update.job_id)
                assert job is None or job.latest.offset >= update.offset
            for name, states in may_be.items():
                job = rig.jobs.get(name)
                ended = any(state.endswith("!") for state in states)
                if job is None:
                    assert "gone" in states or ended, (life, name, states)  # what has ended may make room
                else:
                    found = rig.record(name)["message"] + "!" * job.latest.ended
                    assert found in states, (life, name, states, found)
    assert len(epochs) == 1
    assert counts["done"] >= DONE * KILLS, counts
