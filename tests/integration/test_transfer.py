"""``statuswire export`` and ``import``: what is in one store is in another one afterwards, and readers go on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from server.app import StartError
from server.brokers.base import Acknowledge
from server.cli import main
from tests.redis_servers import RedisServer
from tests.streams import event_stream, session, stream_at
from tests.support import InProcess, server, until, until_answered

pytestmark = pytest.mark.slow

PAIRS = [
    ("sqlite", "redis"),
    ("redis", "sqlite"),
    pytest.param("sqlite", "sqlite"),
    pytest.param("redis", "redis"),
]
KINDS = ["sqlite", pytest.param("redis")]


@pytest.fixture
def store_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], str]:
    """The URL of a store of this kind; Redis is started only for those who need it."""

    def url(kind: str, role: str) -> str:
        if kind == "redis":
            redis = request.getfixturevalue("redis")
            return f"{redis.url}/{1 if role == 'source' else 2}"
        return f"sqlite:{tmp_path / role}.db"

    return url


async def run(*arguments: str) -> int:
    """The command in a thread of its own."""
    return await trio.to_thread.run_sync(main, arguments)


async def fill(at: InProcess) -> None:
    """Jobs of every kind and age, with gaps where a store leaves some."""
    post = at.post
    for number in range(30):
        user = f"user-{number % 7}"
        await post("/api/v2/jobs", {"jobId": f"job-{number}", "userId": user, "kind": "k", "metadata": {"ü": [1, 2.5]}})
        for progress in range(number % 4):
            await at.publish(f"job-{number}", progress=progress * 10, seq=progress, message='"\n\u2028')
        if number % 3 == 0:
            await at.publish(f"job-{number}", status="completed" if number % 2 else "failed", result={"n": number})
    await at.publish("job-0", attempt=2, status="processing")
    await at.ask("DELETE", "/api/v2/jobs/job-1")
    await at.ask("DELETE", "/api/v2/jobs/job-2")
    await post("/api/v2/jobs", {"jobId": "job-2", "userId": "another"})
    await post("/api/v2/jobs", {"jobId": "parent", "userId": "p", "autoComplete": True})
    for part in range(4):
        await post("/api/v2/jobs", {"jobId": f"part-{part}", "userId": "p", "parentId": "parent", "weight": part + 1})
    await at.publish("part-0", status="completed")
    await at.publish("part-1", progress=50)
    await post("/api/v2/jobs", {"jobId": "leased", "userId": "l", "ttl": 3600, "status": "processing"})
    await at.ask("POST", "/api/v2/jobs/leased/cancel", {})
    # The table of jobs is full by now: the longest-ended one makes room for each.
    for number in range(5):
        await post("/api/v2/jobs", {"jobId": f"late-{number}", "userId": "u"})
    await at.publish("late-0", progress=1)


async def contents(at: InProcess) -> dict[str, Any]:
    """All that can be seen, and what cannot."""
    answer = await at.get("/api/v2/jobs?limit=1000")
    node = at.node
    histories = {}
    for job in answer.json["jobs"]:
        histories[job["jobId"]] = (await at.get(f"/api/v2/jobs/{job['jobId']}/history")).json
    return {
        "list": answer.json,
        "histories": histories,
        "private": {job_id: (job.created, job.private) for job_id, job in node.jobs.jobs.items()},
        "latest": {job_id: msgspec.structs.asdict(job.latest) for job_id, job in node.jobs.jobs.items()},
        "log": [msgspec.structs.asdict(update) for update in node.history.everything(0)],
        "epoch": node.history.epoch,
        "last": node.history.last,
    }


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_everything_is_there_and_readers_go_on(
    store_of: Callable[[str, str], str], tmp_path: Path, source: str, target: str
) -> None:
    tables: dict[str, Any] = {"history": {"max_jobs": 38}}
    old, new, lines = store_of(source, "source"), store_of(target, "target"), str(tmp_path / "lines")
    async with server(store={"url": old}, **tables) as at:
        await fill(at)
        before = await contents(at)
    assert await run("export", "--store", old, lines) == 0
    assert await run("import", "--store", new, lines) == 0
    async with server(store={"url": new}, **tables) as at:
        after = await contents(at)
        assert after == before
        epoch, last = before["epoch"], before["last"]
        middle = before["log"][-10]["offset"]
        missed = [f"{epoch}:{update['offset']}" for update in before["log"] if update["offset"] > middle]
        cursor = f"{epoch}:{middle}"

        async with event_stream(at, headers={"Last-Event-ID": cursor}) as sse, session(at) as ws:
            events = [await sse.event() for _ in range(1 + len(missed))]
            assert [event.id for event in events[1:]] == missed
            begun = await ws.subscribe(last_seen=cursor)
            assert begun["recovered"] is True
            assert [(await ws.receive())["id"] for _ in missed] == missed
            polled = await at.get(f"/api/v2/jobs/poll?timeout=0&last_seen={cursor}")
            assert polled.json["reset"] is False
            assert [update["id"] for update in polled.json["updates"]] == missed

            version = after["latest"]["leased"]["version"]
            answer = await at.publish("leased", progress=80)
            assert answer.json == {"id": f"{epoch}:{last + 1}", "version": version + 1, "cancelRequested": True}
            assert (await sse.event()).id == f"{epoch}:{last + 1}"
            assert (await ws.receive())["version"] == version + 1
        # What the server knows beside the records goes on as well.
        assert (await at.publish("job-10", seq=0)).json["duplicate"] is True
        assert (await at.post("/api/v2/jobs/job-4/updates", {"userId": "else"})).error == "owner_fixed"
        for part in (1, 2, 3):
            await at.publish(f"part-{part}", status="completed")
        assert (await at.get("/api/v2/jobs/parent")).json["status"] == "completed"
        # Another one makes room here, too.
        for number in range(3):
            await at.publish(f"newest-{number}", userId="n")
        assert len(at.node.jobs) == 38
    # And it survives a restart of the new store's server.
    async with server(store={"url": new}, **tables) as at:
        log = (await contents(at))["log"]
        assert log[: len(before["log"])] == before["log"]
    assert await run("export", "--store", new, str(tmp_path / "again")) == 0


async def test_a_log_that_was_cut_is_not_said_to_reach_further_back(
    store_of: Callable[[str, str], str], tmp_path: Path
) -> None:
    """With a larger bound in the new place, cursors that the old one had lost stay lost."""
    old, new, back = store_of("sqlite", "source"), store_of("redis", "target"), f"sqlite:{tmp_path / 'back.db'}"
    small, large = ["--config", str(tmp_path / "small.toml")], ["--config", str(tmp_path / "large.toml")]
    (tmp_path / "small.toml").write_text("[history]\nmax_updates = 20\n")
    (tmp_path / "large.toml").write_text("[history]\nmax_updates = 10000\n")
    lines = str(tmp_path / "lines")
    async with server(store={"url": old}, history={"max_updates": 20}) as at:
        for number in range(50):
            await at.publish("a", userId="u", progress=number)
        epoch = at.node.history.epoch
        first = at.node.history.first
        record = (await at.get("/api/v2/jobs/a")).json
    assert await run("export", *small, "--store", old, lines) == 0
    for url in (new, back):
        assert await run("import", *large, "--store", url, lines) == 0
        async with server(store={"url": url}, history={"max_updates": 10_000}) as at:
            assert (await at.get("/api/v2/jobs/a")).json == record
            for offset, reset in ((first - 2, True), (first, False), (49, False), (50, False), (51, True)):
                answer = await at.get(f"/api/v2/jobs/poll?timeout=0&last_seen={epoch}:{offset}")
                assert answer.json["reset"] is reset, offset


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_stored_notifications_and_marks_come_along(
    store_of: Callable[[str, str], str], tmp_path: Path, source: str, target: str
) -> None:
    old, new, lines = store_of(source, "source"), store_of(target, "target"), str(tmp_path / "lines")
    async with server(store={"url": old}) as at:
        body = {"target": "users", "targetIds": ["a", "b"], "event": "e", "data": {"x": 1}, "store": True}
        assert (await at.post("/api/sse/message", body)).status == 200
        await at.publish("j", userId="u")
        await at.post("/api/sse/message", {"target": "channel", "targetId": "c", "event": "e", "data": 1})
        await at.node.broker.save_mark("reader", "somewhere")
        inboxes = {user: at.node.broker.inboxes.of_user(user) for user in "ab"}
        assert all(inboxes.values())
    assert await run("export", "--store", old, lines) == 0
    assert await run("import", "--store", new, lines) == 0
    async with server(store={"url": new}) as at:
        await at.node.broker.follow(["*"])
        for user, kept in inboxes.items():
            found = [msgspec.structs.asdict(notice) for notice in at.node.broker.inboxes.of_user(user)]
            assert found == [msgspec.structs.asdict(notice) for notice in kept]
        assert await at.node.broker.load_mark("reader") == "somewhere"
        assert [update.type for update in at.node.history.everything(0)] == [
            "notification",
            "status_update",
            "notification",
        ]
        assert at.node.history.notices(0)[1].targets == ("channel/c",)
        # And they go like any other.
        end = f"{at.node.history.epoch}:{at.node.history.last}"
        async with stream_at(at, f"/api/sse?userId=a&last_seen={end}") as stream:
            assert (await stream.event()).name == "connected"
        await until(lambda: at.node.broker.inboxes.places == 1)


@pytest.mark.parametrize("target", KINDS)
async def test_what_came_last_had_no_entry(store_of: Callable[[str, str], str], tmp_path: Path, target: str) -> None:
    """In Redis an acknowledgement takes an offset: a reader that stands there misses nothing of what comes next."""
    old, new, lines = store_of("redis", "source"), store_of(target, "target"), str(tmp_path / "lines")
    async with server(store={"url": old}) as at:
        await at.publish("j", userId="u")
        body = {"target": "user", "targetId": "a", "event": "e", "data": {"x": 1}, "store": True}
        assert (await at.post("/api/sse/message", body)).status == 200
        await at.node.broker.follow(["*"])
        await at.node.broker.submit([Acknowledge("a", at.node.history.last)]).wait_kept()
        await until(lambda: at.node.history.last == 3)
        epoch = at.node.history.epoch
    assert await run("export", "--store", old, lines) == 0
    assert await run("import", "--store", new, lines) == 0
    for version in (2, 3):
        async with server(store={"url": new}) as at:
            await at.node.broker.follow(["*"])
            assert (at.node.history.epoch, at.node.history.last) == (epoch, version + 1)
            await at.publish("j", progress=version)
            for offset, count in ((1, version - 1), (3, version - 1), (version + 1, 1)):
                answer = await at.get(f"/api/v2/jobs/poll?timeout=0&last_seen={epoch}:{offset}")
                assert answer.json["reset"] is False
                assert [update["version"] for update in answer.json["updates"]][-1:] == [version]
                assert len(answer.json["updates"]) <= count


async def test_a_backup_is_put_back_under_a_new_name(tmp_path: Path) -> None:
    """Else a reader of what came after it could take other updates with the same numbers for those it has."""
    old, new, lines = f"sqlite:{tmp_path / 'old.db'}", f"sqlite:{tmp_path / 'new.db'}", str(tmp_path / "lines")
    async with server(store={"url": old}) as at:
        await at.publish("j", userId="u")
        epoch = at.node.history.epoch
    assert await run("export", "--store", old, lines) == 0
    assert await run("import", "--new-epoch", "--store", new, lines) == 0
    async with server(store={"url": new}) as at:
        await at.publish("j", progress=2)
        answer = await at.get(f"/api/v2/jobs/poll?timeout=0&last_seen={epoch}:1")
        assert (answer.json["reset"], answer.json["updates"][0]["version"]) == (True, 2)


# What is refused, and changes nothing


@pytest.fixture
async def lines(tmp_path: Path) -> bytes:
    """A small export."""
    old = f"sqlite:{tmp_path / 'small.db'}"
    async with server(store={"url": old}) as at:
        for number in range(3):
            await at.publish(f"j{number}", userId="u", progress=number)
    assert await run("export", "--store", old, str(tmp_path / "small")) == 0
    return (tmp_path / "small").read_bytes()


def signed(*lines: bytes) -> bytes:
    """Lines with a last one that fits: what is wrong in them is not the checksum."""
    text = b"".join(line + b"\n" for line in lines)
    jobs, updates = (sum(line.startswith(start) for line in lines) for start in (b'{"job"', b'{"update"'))
    end = {"jobs": jobs, "updates": updates, "sha256": hashlib.sha256(text).hexdigest()}
    return text + json.dumps({"end": end}).encode() + b"\n"


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda text: b"", "does not begin like an export"),
    "foreign": (lambda text: b'{"jobId":"a"}\n', "does not begin like an export"),
    "no text": (lambda text: b"\x1f\x8b" + text, "does not begin like an export"),
    "newer": (lambda text: text.replace(b'"format":1', b'"format":2', 1), "format 2"),
    "cut off in a line": (lambda text: text[:-40], "breaks off in line 8"),
    "cut off behind a line": (lambda text: b"".join(text.splitlines(keepends=True)[:-1]), "breaks off in line 8"),
    "a line gone": (lambda text: b"".join(line for line in text.splitlines(True) if b'"j1"' not in line), "has 2 jobs"),
    "a letter changed": (lambda text: text.replace(b'"j1"', b'"j9"'), "its checksum does not fit"),
    "more behind it": (lambda text: text + text, "goes on behind its last line"),
    "no JSON": (lambda text: signed(text.splitlines()[0], b"what?"), "line 2 of the input cannot be read"),
    "another kind of line": (lambda text: signed(text.splitlines()[0], b'{"what":1}'), "line 2 of the input"),
    "a job of nothing": (lambda text: signed(text.splitlines()[0], b'{"job":{}}'), "line 2 of the input"),
    "no end of brackets": (
        lambda text: signed(text.splitlines()[0], b'{"job":%b}' % (b"[" * 100_000)),
        "line 2 of the input cannot be read",
    ),
    "an update twice": (
        lambda text: signed(text.splitlines()[0], *[line for line in text.splitlines() if b'"update"' in line] * 2),
        "offset 1 comes after 3",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BROKEN)
async def test_input_that_is_not_sound(
    lines: bytes,
    store_of: Callable[[str, str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    kind: str,
    name: str,
) -> None:
    break_, words = BROKEN[name]
    (tmp_path / "broken").write_bytes(break_(lines))
    target = store_of(kind, "target")
    assert await run("import", "--store", target, str(tmp_path / "broken")) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "target.db").exists()
    assert not any("importing" in name for name in os.listdir(tmp_path))
    if kind == "redis":
        with request.getfixturevalue("redis").oracle(db=2) as oracle:
            assert oracle.keys() == []
    assert await run("import", "--store", target, str(tmp_path / "small")) == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_with_something_in_it(
    lines: bytes, store_of: Callable[[str, str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    target = store_of(kind, "target")
    async with server(store={"url": target}):
        pass  # one that was started but never used is fine
    assert await run("import", "--store", target, str(tmp_path / "small")) == 0
    assert await run("import", "--store", target, str(tmp_path / "small")) == 1
    assert "is not empty (its log stands at 3)" in capsys.readouterr().err
    async with server(store={"url": target}) as at:
        assert len((await at.get("/api/v2/jobs")).json["jobs"]) == 3


async def test_a_file_that_a_server_has(tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: bytes) -> None:
    url = f"sqlite:{tmp_path / 'busy.db'}"
    async with server(store={"url": url}):
        assert await run("export", "--store", url, str(tmp_path / "out")) == 1
        assert "is in use by another server; stop it" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert await run("import", "--store", url, str(tmp_path / "small")) == 1
        assert "is in use by another server" in capsys.readouterr().err


async def test_stores_that_cannot_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], redis: RedisServer
) -> None:
    assert await run("export", "--store", "memory:") == 2
    assert "memory: keeps nothing" in capsys.readouterr().err
    assert await run("export", "--store", f"sqlite:{tmp_path / 'none.db'}") == 1
    assert "there is no file" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()
    assert await run("export", "--store", redis.url) == 1
    assert "there is nothing of statuswire" in capsys.readouterr().err


async def test_an_interrupted_import_into_redis(
    lines: bytes, store_of: Callable[[str, str], str], tmp_path: Path, redis: RedisServer
) -> None:
    """Killed half-way: no server takes what there is for a store; the next import begins anew."""
    target = store_of("redis", "target")
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "server", "import", "--store", target]
    process = await trio.to_thread.run_sync(partial(subprocess.Popen, command, stdin=subprocess.PIPE, env=environment))
    assert process.stdin is not None
    first, *rest = lines.splitlines(keepends=True)
    process.stdin.write(first + rest[0])
    process.stdin.flush()
    with redis.oracle(db=2) as oracle:
        await until(lambda: oracle.exists("{statuswire}:importing"))
        process.kill()
        process.wait()
        process.stdin.close()
        with pytest.raises(StartError, match=r"an import into .* is under way or broke off"):
            async with server(store={"url": target}):
                pass  # pragma: no cover
        assert await run("import", "--store", target, str(tmp_path / "small")) == 1  # it might still be alive
        oracle.delete("{statuswire}:importing")  # as after half a minute
    assert await run("import", "--store", target, str(tmp_path / "small")) == 0
    async with server(store={"url": target}) as at:
        assert len((await at.get("/api/v2/jobs")).json["jobs"]) == 3


async def test_a_server_on_the_empty_redis_sees_it_all_at_once(
    lines: bytes, store_of: Callable[[str, str], str], tmp_path: Path
) -> None:
    target = store_of("redis", "target")
    async with server(store={"url": target}) as at, session(at) as ws:
        await ws.subscribe()
        assert await run("import", "--store", target, str(tmp_path / "small")) == 0
        message = await ws.receive()
        assert message["type"] == "reset"
        answer = await at.publish("j0", progress=50)
        assert answer.json["version"] == 2


async def test_standard_streams(tmp_path: Path, lines: bytes) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ours = f"{sys.executable} -m server"
    command = f"{ours} export --store sqlite:small.db | {ours} import --store sqlite:copy.db"
    done = await trio.run_process(["sh", "-c", command], cwd=tmp_path, env=environment, capture_stderr=True)
    assert sorted(done.stderr.decode().splitlines()) == [
        "exported 3 jobs and 3 updates",
        "imported 3 jobs and 3 updates",
    ]
    assert await run("export", "--store", f"sqlite:{tmp_path / 'copy.db'}", str(tmp_path / "copy")) == 0
    assert (tmp_path / "copy").read_bytes() == lines


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_that_leaves(store_of: Callable[[str, str], str], tmp_path: Path, kind: str) -> None:
    """As ``head`` does: that is no error of the export's."""
    url = store_of(kind, "source")
    async with server(store={"url": url}) as at:
        await at.post("/api/v2/updates", [{"jobId": f"j{n}", "userId": "u", "message": "m" * 1000} for n in range(500)])
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    script = f"{sys.executable} -m server export --store {url} | head -c 10"
    done = await trio.run_process(["sh", "-c", script], env=environment, capture_stdout=True, capture_stderr=True)
    assert (len(done.stdout), done.stderr) == (10, b"")


@pytest.mark.parametrize(("source", "target"), PAIRS[:2])
async def test_many(store_of: Callable[[str, str], str], tmp_path: Path, source: str, target: str) -> None:
    old, new, lines = store_of(source, "source"), store_of(target, "target"), str(tmp_path / "lines")
    async with server(store={"url": old}) as at:
        for start in range(0, 20_000, 500):
            updates = [
                {"jobId": f"job-{n}", "userId": f"user-{n % 50}", "progress": n % 100, "message": "m" * 200}
                for n in range(start, start + 500)
            ]
            assert (await at.post("/api/v2/updates", updates)).json["accepted"] == 500
        await until_answered(at, "/api/v2/jobs", 200)
        before = [msgspec.structs.asdict(update) for update in at.node.history.everything(0)]
        assert len(before) == 20_000
    for arguments in (("export", "--store", old, lines), ("import", "--store", new, lines)):
        # Measured in a process of its own: what it holds does not grow with what there is.
        code = (
            "import server.cli; assert server.cli.main() == 0; "
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        done = await trio.run_process(
            [sys.executable, "-c", code, *arguments],
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_stdout=True,
        )
        assert int(done.stdout) < 80_000, arguments  # KiB, half of which is Python
    async with server(store={"url": new}) as at:
        await until_answered(at, "/api/v2/jobs", 200)
        assert [msgspec.structs.asdict(update) for update in at.node.history.everything(0)] == before
        assert len(at.node.jobs) == 20_000
