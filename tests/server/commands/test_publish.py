from __future__ import annotations

import io
import json
import socket
from typing import Any

import pytest

from server.cli import main
from server.commands import publish
from tests.server.commands.scripted import Answer, as_json, error, scripted

KEPT = {"id": "e:7", "version": 3}


def test_publishes_and_prints_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--user", "ann", "--status", "processing", "--progress", "45", "--message", "half", "--stage", "pages"]
    with scripted(as_json(200, KEPT)) as server:
        code = main(["publish", "job_1", "--url", server.url, "--token", "t0k", *arguments])
    assert code == 0
    assert json.loads(capsys.readouterr().out) == KEPT
    (seen,) = server.seen
    assert (seen.method, seen.target) == ("POST", "/api/v2/jobs/job_1/updates")
    assert seen.headers["authorization"] == "Bearer t0k"
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["idempotency-key"]
    assert seen.body == b'{"userId":"ann","status":"processing","progress":45,"message":"half","stage":"pages"}'


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        ([], {}),
        (["--progress", "12.5"], {"progress": 12.5}),
        (["--data", '{"kind":"x","status":"queued"}', "--status", "failed"], {"kind": "x", "status": "failed"}),
    ],
)
def test_bodies(arguments: list[str], body: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(as_json(200, KEPT)) as server:
        assert main(["publish", "j", "--url", server.url, *arguments]) == 0
    assert json.loads(server.seen[0].body) == body
    assert "authorization" not in server.seen[0].headers


def test_data_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"result": [1]}'))
    with scripted(as_json(200, KEPT)) as server:
        assert main(["publish", "j", "--url", server.url, "--data", "-"]) == 0
    assert json.loads(server.seen[0].body) == {"result": [1]}


def test_address_and_token_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(as_json(200, KEPT)) as server:
        monkeypatch.setenv("STATUSWIRE_URL", server.url + "/base/")
        monkeypatch.setenv("STATUSWIRE_TOKEN", "from-env")
        assert main(["publish", "a/b c"]) == 0
    assert server.seen[0].target == "/base/api/v2/jobs/a%2Fb%20c/updates"
    assert server.seen[0].headers["authorization"] == "Bearer from-env"


def test_retries_use_one_idempotency_key(capsys: pytest.CaptureFixture[str]) -> None:
    unanswered = Answer(None)
    with scripted(error(503, "draining", "later", Retry_After="0"), unanswered, as_json(200, KEPT)) as server:
        assert main(["publish", "j", "--url", server.url, "--progress", "1"]) == 0
    assert len(server.seen) == 3
    assert len({seen.headers["idempotency-key"] for seen in server.seen}) == 1
    assert len({seen.body for seen in server.seen}) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == KEPT
    assert captured.err == ""


def test_every_publish_has_its_own_key(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(as_json(200, KEPT), as_json(200, KEPT)) as server:
        for _ in range(2):
            assert main(["publish", "j", "--url", server.url]) == 0
    assert len({seen.headers["idempotency-key"] for seen in server.seen}) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            error(404, "job_not_found", "there is no job 'j' that you may see"),
            "(request r1); with --user, its owner, it is made\n",
        ),
        (error(409, "job_ended", "j has\n\x1b[31mended"), "statuswire: j has ?[31mended (request r1)\n"),
        (error(401, "unauthorized", "a token is needed"), "a token is needed"),
        (Answer(404, body=b"<html>"), "answered 404 Not Found"),
        (Answer(400, body=b"[1]"), "answered 400 Bad Request"),
        (Answer(400, body=b'{"error":{"message":5}}'), "answered 400 Bad Request"),
        (Answer(301, {"Location": "https://x/"}), "answered 301 Moved Permanently to https://x/"),
    ],
)
def test_a_refusal_is_final(answer: Answer, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(answer) as server:
        assert main(["publish", "j", "--url", server.url]) == 1
    assert len(server.seen) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_tries_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(*[error(503, "store_unavailable", "the store is away") for _ in range(20)]) as server:
        assert main(["publish", "j", "--url", server.url]) == 1
    assert len(server.seen) == publish.ATTEMPTS
    assert "the store is away" in capsys.readouterr().err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert main(["publish", "j", "--url", url]) == 1
    assert f"statuswire: no connection to {url}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "ftp://x"], "expected something like http://127.0.0.1:3000"),
        (["--url", "localhost:3000"], "expected something like"),
        (["--url", "http://"], "expected something like"),
        (["--url", "http://h:99999/"], "expected something like"),
        (["--url", "http://h/?x=1"], "expected something like"),
        (["--token", "two words"], "not an access token"),
        (["--token", "é"], "not an access token"),
        (["--token", "a\nb"], "not an access token"),
        (["--data", "{"], "--data is not JSON"),
        (["--data", "[" * 100_000], "--data is not JSON"),
        (["--data", '{"message":"\udcff"}'], "--data is not JSON"),
        (["--data", "[1]"], "--data: expected a JSON object"),
    ],
)
def test_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "j", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("progress", ["x", "nan", "inf"])
def test_progress_is_a_number(progress: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["publish", "j", "--progress", progress])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("statuswire: argument --progress: invalid number value")
