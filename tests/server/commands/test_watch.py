from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server.cli import main
from server.commands.client import open_client
from server.commands.display import Lines, _most_alive, describe
from server.commands.watch import NOT_LIVE, READ_TIMEOUT, Watched, _Stream
from tests.server.commands.scripted import Answer, ScriptedServer, error, scripted, sse, stream

pytestmark = pytest.mark.slow

DONE = Answer(204)


def job(job_id: str = "j", status: str = "processing", **fields: Any) -> dict[str, Any]:
    return {"jobId": job_id, "userId": "ann", "status": status, **fields}


def update(job_id: str = "j", status: str = "processing", **fields: Any) -> dict[str, Any]:
    kind = {"completed": "job_completed", "failed": "job_failed", "cancelled": "job_cancelled"}.get(status)
    return {"type": kind or "status_update", **job(job_id, status, **fields)}


def snapshot(*jobs: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "snapshot", "jobs": list(jobs), **fields}


CONNECTED = sse({"type": "connected"}, retry=0)
HEARTBEAT = {"type": "heartbeat", "timestamp": "2026-01-31T12:00:00Z"}


def watch(server: ScriptedServer, *arguments: str) -> int:
    return main(["watch", "--url", server.url, *arguments])


def environment(**extra: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("STATUSWIRE_")} | extra


@contextmanager
def watching(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "server", "watch", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


# --- following ----------------------------------------------------------------------------------------------------


def test_follows_a_job_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    first = stream(
        CONNECTED,
        sse(snapshot(job(progress=10, stage="pages", currentOperation="page 1/10", estimatedTimeRemaining=93)), "e:1"),
        sse(HEARTBEAT, "e:1"),
        sse(update(progress=50.4, timestamp="2026-01-31T12:00:00Z"), "e:2"),
        sse(update(status="completed", progress=100), "e:3"),
    )
    with scripted(first) as server:
        assert watch(server, "j", "--token", "t0k") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "j processing 10% pages: page 1/10, 1:33 left",
        "2026-01-31T12:00:00Z j processing 50%",
        "j completed 100%",
    ]
    assert captured.err == ""
    (seen,) = server.seen
    assert (seen.method, seen.target) == ("GET", "/api/v2/jobs/stream?jobIds=j")
    assert seen.headers["accept"] == "text/event-stream"
    assert seen.headers["authorization"] == "Bearer t0k"
    assert "last-event-id" not in seen.headers


def test_comes_back_with_its_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    lost = stream(CONNECTED, sse(snapshot(job(progress=1)), "e:1"), sse(update(progress=2), "e:2"), drop=True)
    rest = stream(CONNECTED, sse(update(progress=3), "e:3"), sse(update(status="completed"), "e:4"))
    with scripted(lost, error(503, "draining", "the server drains", Retry_After="0"), Answer(None), rest) as server:
        assert watch(server, "j") == 0
    assert [seen.headers.get("last-event-id") for seen in server.seen] == [None, "e:2", "e:2", "e:2"]
    captured = capsys.readouterr()
    assert [line.split()[-1] for line in captured.out.splitlines()] == ["1%", "2%", "3%", "completed"]
    notes = captured.err.splitlines()
    assert len(notes) == 4
    assert all(note.startswith("statuswire: ") and note.endswith("; trying again") for note in notes[:-1])
    assert notes[-1] == "statuswire: live"
    assert "the server drains (request r1)" in notes[1]


def test_the_same_trouble_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    away = [error(503, "draining", "away") for _ in range(5)]
    with scripted(*away, stream(sse(snapshot(job(status="completed")), "e:1"))) as server:
        assert watch(server, "j") == 0
    assert capsys.readouterr().err == "statuswire: away (request r1); trying again\nstatuswire: live\n"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_server_without_its_store_is_not_live(form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cut_off = sse(HEARTBEAT | {"live": False}, "e:1")
    first = stream(
        CONNECTED,
        sse(snapshot(job(progress=1)), "e:1"),
        sse(HEARTBEAT, "e:1"),
        cut_off,
        cut_off,
        sse(HEARTBEAT, "e:1"),
        cut_off,
        drop=True,
    )
    second = stream(sse({"type": "connected", "live": False}, retry=0), sse(update(progress=2), "e:2"), drop=True)
    third = stream(CONNECTED, sse(update(status="completed"), "e:3"))
    with scripted(first, second, third) as server:
        assert watch(server, "j", *form) == 0
    captured = capsys.readouterr()
    notes = captured.err.splitlines()
    cut = f"statuswire: {NOT_LIVE}"
    lost = notes[3]
    assert lost.endswith("; trying again")
    assert notes == [cut, "statuswire: live", cut, lost, cut, lost, "statuswire: live"]
    assert len(captured.out.splitlines()) == (11 if form else 3)


@pytest.mark.parametrize(
    ("heartbeat", "seconds"), [(30.0, 90.0), (0.5, 90.0), (120, 360.0), (1e300, 3600.0), (None, 90.0)]
)
def test_silence_is_measured_in_heartbeats(heartbeat: float | None, seconds: float) -> None:
    with open_client("http://127.0.0.1", None, read_timeout=READ_TIMEOUT) as client:
        stream = _Stream(client, "", {}, Lines(sys.stdout))
        stream.take({"type": "connected", "heartbeat": heartbeat})
        assert client.timeout.read == seconds


def test_a_silent_connection_is_given_up(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.commands.watch.READ_TIMEOUT", 0.3)
    silent = stream(CONNECTED, sse(snapshot(job()), "e:1"), hold=True)
    # more than one, should this machine be slow enough to miss the deadline too
    rest = [stream(sse(update(status="completed"), "e:2")) for _ in range(5)]
    with scripted(silent, *rest) as server:
        assert watch(server, "j") == 0
    assert server.seen[1].headers["last-event-id"] == "e:1"
    assert "timed out; trying again" in capsys.readouterr().err


def test_no_content_means_that_it_is_all_over(capsys: pytest.CaptureFixture[str]) -> None:
    first = stream(CONNECTED, sse(snapshot(job("a", "completed"), job("b")), "e:1"))
    # a is opened again, and what became of it is lost with the connection
    second = stream(CONNECTED, sse(update("b", "completed"), "e:2"), sse(update("a", attempt=2), "e:3"), drop=True)
    with scripted(first, second, DONE) as server:
        assert watch(server, "a", "b") == 1
    assert len(server.seen) == 3
    with scripted(DONE) as server:
        assert watch(server, "never-seen") == 1


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["completed", "completed"], 0),
        (["completed", "failed"], 1),
        (["cancelled", "completed"], 1),
    ],
)
def test_exit_status_tells_how_the_jobs_ended(
    statuses: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    updates = [sse(update(f"j{index}", status), f"e:{index + 2}") for index, status in enumerate(statuses)]
    with scripted(stream(CONNECTED, sse(snapshot(), "e:1"), *updates)) as server:
        assert watch(server, "j0", "j1") == code


def test_a_deleted_job_has_ended_and_failed_unless_it_was_over(capsys: pytest.CaptureFixture[str]) -> None:
    gone = {"type": "job_deleted", "jobId": "j", "userId": "ann"}
    with scripted(stream(sse(snapshot(job()), "e:1"), sse(gone, "e:2"))) as server:
        assert watch(server, "j") == 1
    with scripted(stream(sse(snapshot(job(status="completed")), "e:1"), sse(gone, "e:2"))) as server:
        assert watch(server, "j") == 0
    assert capsys.readouterr().out.splitlines() == ["j processing", "j deleted", "j completed"]


def test_reset_replaces_what_was_known(capsys: pytest.CaptureFixture[str]) -> None:
    first = stream(CONNECTED, sse(snapshot(job("a"), job("b", "failed")), "old:9"), drop=True)
    second = stream(
        sse({"type": "connected"}, "old:9", retry=0),
        sse({"type": "reset"}, "old:9"),
        sse(snapshot(job("a", "completed"), more=True)),
        sse(snapshot(job("c", "completed")), "new:1"),
    )
    with scripted(first, second) as server:
        assert watch(server, "--user", "ann", "--exit") == 0
    assert server.seen[0].target == "/api/v2/jobs/stream?userId=ann"
    assert capsys.readouterr().out.splitlines() == ["a processing", "b failed", "a completed", "c completed"]


def test_a_snapshot_that_was_cut_off_does_not_count() -> None:
    watched = Watched(("a",))
    watched.take(snapshot(job("x", "failed"), more=True))
    watched.connected()
    assert watched.take(snapshot(job("a", "completed"))) == [job("a", "completed")]
    assert list(watched.jobs) == ["a"]
    assert watched.ended
    assert watched.all_completed


@pytest.mark.parametrize(
    "message", [{}, {"type": "snapshot"}, {"type": "snapshot", "jobs": [1, {}]}, {"type": "status_update"}]
)
def test_messages_that_make_no_sense_change_nothing(message: dict[str, Any]) -> None:
    assert Watched(("a",)).take(message) == []


def test_odd_events_are_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    odd = [b": comment\n\n", b"data: {\n\n", b"data: 5\n\n", sse({"type": "from-the-future", "jobId": "j"}, "e:1")]
    with scripted(stream(*odd, sse(snapshot(job(status="completed")), "e:2"))) as server:
        assert watch(server, "j") == 0
    assert capsys.readouterr().out == "j completed\n"


def test_all_jobs_until_none_runs(capsys: pytest.CaptureFixture[str]) -> None:
    events = [sse(snapshot(job("a"), job("b", "completed")), "e:1"), sse(update("a", "failed", error="boom"), "e:2")]
    with scripted(stream(*events, hold=True)) as server:
        assert watch(server, "--all", "--exit") == 1
    assert server.seen[0].target == "/api/v2/jobs/stream"
    assert capsys.readouterr().out.splitlines() == ["a processing", "b completed", "a failed boom"]


def test_nothing_there_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(stream(sse(snapshot(), "e:1"), hold=True)) as server:
        assert watch(server, "--all", "--exit") == 0


def test_json_is_every_event_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    last = update(status="completed")
    events: list[dict[str, Any]] = [{"type": "connected"}, snapshot(job(message="ü")), HEARTBEAT, last]
    split = b'id: e:9\ndata: {"type":\ndata: "later"}\n\n'
    with scripted(stream(*[sse(event, "e:1") for event in events], split)) as server:
        assert watch(server, "j", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [json.dumps(event) for event in events]
    assert lines[-1] == '{"type":"later"}'


def test_try_later_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    later = {"type": "error", "code": "try_later", "message": "the server drains"}
    over = stream(sse(snapshot(job(status="completed")), "e:1"))
    with scripted(stream(sse(later, retry=1)), stream(sse(later, retry=300)), over) as server:
        started = time.monotonic()
        assert watch(server, "j") == 0
        assert time.monotonic() - started >= 0.3
    assert capsys.readouterr().err == "statuswire: the server drains\nstatuswire: live\n"


def test_retry_after_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    fast = error(429, "rate_limited", "too fast", Retry_After="1")
    with scripted(fast, stream(sse(snapshot(job(status="completed")), "e:1"))) as server:
        started = time.monotonic()
        assert watch(server, "j") == 0
        assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(401, "invalid_token", "the token is not valid"), "the token is not valid (request r1)"),
        (error(403, "forbidden", "not yours"), "not yours"),
        (error(400, "invalid_parameter", "jobIds: no"), "jobIds: no"),
        (Answer(404), "answered 404 Not Found"),
        (Answer(302, {"Location": "/login"}), "answered 302 Found to /login"),
        (Answer(200, {"Content-Type": "text/html"}), "answered with text/html: no statuswire server?"),
    ],
)
def test_refused_for_good(answer: Answer, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(answer) as server:
        assert watch(server, "j") == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_token_that_expires_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    expired = {"type": "error", "code": "token_expired", "message": "the token has expired"}
    first = stream(CONNECTED, sse(snapshot(job()), "e:1"), sse(expired))
    with scripted(first, error(401, "token_expired", "no")) as server:
        assert watch(server, "j") == 2
    assert capsys.readouterr().err.splitlines() == ["statuswire: the token has expired", "statuswire: no (request r1)"]


def test_an_event_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    piece = b"data: " + b"x" * (1 << 20) + b"\n"
    with scripted(stream(*[piece] * 17)) as server:
        assert watch(server, "j") == 2
    assert "more than" in capsys.readouterr().err


def test_nobody_listens_at_first(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted() as server:
        url = server.url
    with watching("j", "--url", url) as process:
        assert process.stderr is not None
        assert "no connection to" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name jobs, or give --all or --user"),
        (["j", "--all"], "name jobs, or give --all or --user"),
        (["j", "--user", "ann"], "name jobs, or give --all or --user"),
        (["a,b"], "separate jobs by spaces"),
    ],
)
def test_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_job_named_twice_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(stream(sse(snapshot(job(status="completed")), "e:1"))) as server:
        assert watch(server, "j", "j") == 0
    assert server.seen[0].target.endswith("?jobIds=j")


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"jobId": "j"}, "j"),
        (job(progress=150), "j processing"),
        (job(progress="12"), "j processing"),
        (job(estimatedTimeRemaining=7293), "j processing, 2:01:33 left"),
        (job(estimatedTimeRemaining=0), "j processing"),
        (job(estimatedTimeRemaining=1e300), "j processing"),
        (job(status="completed", estimatedTimeRemaining=5), "j completed"),
        (job(status="failed", error={"code": 1}, message="m"), 'j failed {"code":1}'),
        (job(message="only this"), "j processing only this"),
        (job(message="a\n\x1b[2Jb"), r"j processing a\u000a\u001b[2Jb"),
    ],
)
def test_one_job_on_one_line(record: dict[str, Any], line: str) -> None:
    assert describe(record) == line


def test_those_that_run_have_the_room() -> None:
    records = [job(str(index), "completed" if index % 2 else "processing") for index in range(10)]
    assert [record["jobId"] for record in _most_alive(records, 3)] == ["0", "2", "4"]
    assert [record["jobId"] for record in _most_alive(records, 7)] == ["0", "2", "4", "6", "7", "8", "9"]
    assert _most_alive(records, 10) is records


class Gate:
    """Holds a script until the test has looked."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait(self) -> None:
        self._event.wait(30)

    def open(self) -> None:
        self._event.set()


@contextmanager
def on_gate() -> Iterator[Gate]:
    gate = Gate()
    try:
        yield gate
    finally:
        gate.open()


# --- a real terminal ----------------------------------------------------------------------------------------------


class Terminal:
    """A process on a pseudo terminal of 100 columns, and what it has written to it."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master = master
        self.process = process
        self.output = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read_until(self, pattern: str) -> None:
        deadline = time.monotonic() + 20
        while not re.search(pattern, self.output):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not appear in {self.output!r}"
            assert self._read(), f"ended without {pattern!r}: {self.output!r}"

    def finish(self) -> int:
        while self._read():
            pass
        return self.process.wait(timeout=20)

    def _read(self) -> bool:
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self.output += self._decoder.decode(data)
        return bool(data)


@contextmanager
def on_terminal(*arguments: str, rows: int = 10, term: str = "xterm-256color") -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
    command = [sys.executable, "-m", "server", "watch", *arguments]
    env = environment(TERM=term)
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None)
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True)
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_bars_on_a_terminal() -> None:
    with on_gate() as gate:
        running = job("job_1", progress=40, stage="pages", estimatedTimeRemaining=75)
        script = stream(
            CONNECTED,
            sse(snapshot(running, job("job_2", "queued")), "e:1"),
            gate.wait,
            sse(update("job_1", "completed", progress=100), "e:2"),
            sse(update("job_2", "failed", error="disk \x1b[2Jfull"), "e:3"),
        )
        with scripted(script) as server, on_terminal("job_1", "job_2", "--url", server.url) as terminal:
            terminal.read_until(r"job_1.*━.*40%.*processing.*pages.*1:15")
            terminal.read_until(r"job_2.*queued")
            assert "\x1b[?25l" in terminal.output  # the cursor hides while bars move
            gate.open()
            terminal.read_until(r"job_1.*100%.*completed")
            assert terminal.finish() == 1
    assert re.search(r"\x1b\[[0-9;]*3[41]m", terminal.output)  # colours
    assert "disk \\u001b[2Jfull" in terminal.output
    assert "\x1b[2J" not in terminal.output
    assert terminal.output.rstrip().endswith("\x1b[?25h")  # and is back


def test_more_jobs_than_the_terminal_has_lines() -> None:
    jobs = [job(f"job_{index}") for index in range(30)]
    with (
        scripted(stream(CONNECTED, sse(snapshot(*jobs), "e:1"), hold=True)) as server,
        on_terminal("--all", "--url", server.url, rows=10) as terminal,
    ):
        terminal.read_until(r"job_6")
        terminal.read_until(r"… and 23 more")
        assert "job_7 " not in terminal.output
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.finish() == 130
    assert "Traceback" not in terminal.output
    assert terminal.output.rstrip().endswith("\x1b[?25h")


def test_a_reset_and_trouble_are_shown_below_the_bars() -> None:
    with on_gate() as gate:
        first = stream(CONNECTED, sse(snapshot(job("old")), "e:1"))
        again = stream(CONNECTED, gate.wait, sse({"type": "reset"}), sse(snapshot(job("new", "completed")), "f:1"))
        busy = error(503, "draining", "the server drains", Retry_After="1")
        with scripted(first, busy, again) as server, on_terminal("--all", "--exit", "--url", server.url) as terminal:
            terminal.read_until("old")
            terminal.read_until("the server drains")
            gate.open()
            assert terminal.finish() == 0
    last = terminal.output.rpartition("new")[0].rpartition("\x1b[2K")[2]
    assert "old" not in last


def test_bars_that_are_not_live_say_so() -> None:
    with on_gate() as gate:
        cut_off = sse(HEARTBEAT | {"live": False}, "e:1")
        script = stream(
            CONNECTED, sse(snapshot(job()), "e:1"), cut_off, gate.wait, sse(HEARTBEAT, "e:1"), sse(update("k"), "e:2")
        )
        over = stream(CONNECTED, sse(update(status="completed"), "e:3"))
        with scripted(script, over) as server, on_terminal("j", "--url", server.url) as terminal:
            terminal.read_until(r"j .*processing(.|\n)*not live: ")
            gate.open()
            terminal.read_until(r"k .*processing")
            assert terminal.finish() == 0
    assert NOT_LIVE in terminal.output
    assert "not live" not in terminal.output.rpartition("k ")[2]


def test_waiting_is_shown() -> None:
    with (
        scripted(stream(CONNECTED, sse(snapshot(), "e:1"), hold=True)) as server,
        on_terminal("j", "--url", server.url) as terminal,
    ):
        terminal.read_until("waiting for jobs")


def test_a_dumb_terminal_gets_lines() -> None:
    with (
        scripted(stream(CONNECTED, sse(snapshot(job(status="completed")), "e:1"))) as server,
        on_terminal("j", "--url", server.url, term="dumb") as terminal,
    ):
        assert terminal.finish() == 0
    assert terminal.output == "j completed\r\n"


# --- pipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_leaves_is_no_error(form: list[str]) -> None:
    with on_gate() as gate:
        script = stream(
            CONNECTED, sse(snapshot(job(progress=1)), "e:1"), gate.wait, sse(update(progress=2), "e:2"), hold=True
        )
        with scripted(script) as server:
            with watching("j", "--url", server.url, *form) as process:
                assert process.stdout is not None
                assert process.stderr is not None
                while "j" not in process.stdout.readline():
                    pass
                process.stdout.close()
                gate.open()
                errors = process.stderr.read()
                assert process.wait(20) == 141
            assert errors == ""


def test_lines_come_at_once_through_a_pipe() -> None:
    with (
        scripted(stream(CONNECTED, sse(snapshot(job(progress=1)), "e:1"), hold=True)) as server,
        watching("j", "--url", server.url) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "j processing 1%\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
