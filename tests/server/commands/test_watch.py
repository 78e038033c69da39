"""``watch`` follows jobs to their ends, whatever the server says or does not say."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

import pytest

from server.cli import main
from server.commands.client import open_client
from server.commands.display import Lines
from server.commands.watch import NOT_LIVE, READ_TIMEOUT, Watched, _Stream
from tests.server.commands.scripted import Answer, error, scripted, sse, stream
from tests.server.commands.watching import CONNECTED, HEARTBEAT, job, on_gate, snapshot, update, watch, watching
from tests.support import PATIENCE_S

pytestmark = pytest.mark.slow
DONE = Answer(204)


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
        assert process.wait(PATIENCE_S) == 130
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
                assert process.wait(PATIENCE_S) == 141
            assert errors == ""


def test_lines_come_at_once_through_a_pipe() -> None:
    with (
        scripted(stream(CONNECTED, sse(snapshot(job(progress=1)), "e:1"), hold=True)) as server,
        watching("j", "--url", server.url) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "j processing 1%\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
