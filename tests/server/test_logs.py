from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import Log
from server.logs import MAX_EXCEPTION, MAX_FIELD, configure, log_event, printable

logger = logging.getLogger("server.test")

FORMATS = pytest.mark.parametrize("form", ["plain", "json"])
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl"


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def written(form: Any, event: str = "thing", *, level: int = logging.INFO, **fields: Any) -> str:
    stream = io.StringIO()
    # What is logged here is odd; no other handler shall have it, and no report of the tests.
    logging.getLogger().handlers.clear()
    configure(Log(format=form, level="debug"), stream)
    log_event(logger, level, event, **fields)
    text = stream.getvalue()
    assert text.endswith("\n")
    return text.removesuffix("\n")


def test_plain_line() -> None:
    line = written("plain", "request", method="GET", path="/a b", status=404, seconds=0.0123456789, user=None, ok=True)
    time, rest = line.split(" ", 1)
    assert len(time) == len("2026-01-31T12:00:00.123Z")
    assert time.endswith("Z")
    assert rest == 'info server.test request method=GET path="/a b" status=404 seconds=0.012346 ok=true'


def test_json_line() -> None:
    line = json.loads(written("json", "request", path='/a "b"', status=404, tags=("x", 1), user=None))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "server.test",
        "event": "request",
        "path": '/a "b"',
        "status": 404,
        "tags": ["x", 1],
    }


@FORMATS
def test_levels(form: Any) -> None:
    stream = io.StringIO()
    configure(Log(format=form, level="warning"), stream)
    log_event(logger, logging.INFO, "quiet")
    log_event(logger, logging.WARNING, "loud")
    assert "quiet" not in stream.getvalue()
    assert stream.getvalue().count("loud") == 1


@FORMATS
def test_configure_again_replaces_the_handler(form: Any) -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(Log(), first)
    configure(Log(format=form), second)
    log_event(logger, logging.INFO, "once")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1


def test_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Log())
    log_event(logger, logging.INFO, "hello")
    captured = capsys.readouterr()
    assert captured.err.endswith("info server.test hello\n")
    assert captured.out == ""


def test_warnings_are_logged() -> None:
    stream = io.StringIO()
    configure(Log(format="json"), stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        configure(Log(format="json"), stream)
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "old thing" in json.loads(stream.getvalue())["event"]


@FORMATS
def test_a_record_without_fields(form: Any) -> None:
    stream = io.StringIO()
    configure(Log(format=form), stream)
    logger.info("from %s", "elsewhere")
    logger.info("odd", extra={"fields": "not a mapping"})
    assert "from elsewhere" in stream.getvalue()
    assert stream.getvalue().count("\n") == 2


@FORMATS
@pytest.mark.parametrize(
    "evil",
    [
        "a\n2026-01-31T12:00:00.123Z info server.test forged",
        "a\r\nb",
        "\x1b[2J\x1b]0;title\x07",
        "c1 \x9b31m",
        "del \x7f",
        "separators \u2028 \u2029 \x85 \x0b \x0c",
        "\u202egpj.exe",
        "nul \x00",
        "lone \ud800 surrogate",
    ],
    ids=ascii,
)
def test_nothing_forges_a_line_or_steers_a_terminal(form: Any, evil: str) -> None:
    raw = evil.encode("utf-8", "replace")
    for line in (written(form, value=evil), written(form, evil), written(form, nested={"k": [evil]}, raw=raw)):
        assert len(line.splitlines()) == 1
        assert all(character.isprintable() for character in line)
        line.encode()


@given(text=st.text(), form=st.sampled_from(["plain", "json"]))
def test_any_text_stays_one_printable_line(text: str, form: str) -> None:
    line = written(form, value=text)
    assert len(line.splitlines()) == 1
    line.encode()
    if form == "json":
        assert isinstance(json.loads(line)["value"], str)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=100))
def test_json_values_survive(text: str) -> None:
    assert json.loads(written("json", value=text))["value"] == text


def test_a_plain_value_cannot_pose_as_another_field() -> None:
    assert written("plain", path="/x status=200").endswith('path="/x status=200"')
    assert written("plain", path='/x" status="200').endswith(r'path="/x\" status=\"200"')
    assert written("plain", path="").endswith('path=""')


@FORMATS
def test_fields_cannot_replace_what_is_ours(form: Any) -> None:
    line = written(form, exception="mine", time="now", level2=1)
    if form == "json":
        decoded = json.loads(line)
        assert decoded["time"] != "now"
        assert decoded["time_"] == "now"
        assert decoded["exception_"] == "mine"
    else:
        assert line.endswith("exception_=mine time=now level2=1")


@FORMATS
def test_exceptions_are_on_the_same_line(form: Any) -> None:
    def fail() -> None:
        raise ValueError("first\nsecond")

    try:
        fail()
    except ValueError as error:
        line = written(form, "crash", level=logging.ERROR, exc_info=error, request="r1")
    assert "\n" not in line
    if form == "json":
        decoded = json.loads(line)
        assert decoded["exception"].startswith("Traceback")
        assert decoded["exception"].endswith("ValueError: first\nsecond")
        assert decoded["request"] == "r1"
    else:
        assert "request=r1 exception=" in line
        assert r"ValueError: first\nsecond" in line


def test_an_exc_info_without_an_exception_says_nothing() -> None:
    stream = io.StringIO()
    configure(Log(), stream)
    logger.info("calm", exc_info=True)
    assert stream.getvalue().endswith("calm\n")


@FORMATS
def test_lines_are_bounded(form: Any) -> None:
    line = written(form, "e" * 10_000, value="v" * 10_000, many=list(range(1000)), wide=dict.fromkeys(range(1000), 1))
    assert len(line) < 3 * MAX_FIELD + 2000
    assert "…" in line
    line = written(form, exc_info=ValueError("x" * 100_000 + " the end"))
    assert len(line) < MAX_EXCEPTION + 1000
    assert "the end" in line


@FORMATS
def test_numbers_that_json_cannot_hold(form: Any) -> None:
    line = written(form, big=2**70, low=-(2**63) - 1, nan=float("nan"), fits=2**63)
    assert str(2**70) in line
    assert str(-(2**63) - 1) in line
    assert "null" in line
    assert str(2**63) in line


@FORMATS
@pytest.mark.parametrize(
    "text",
    [
        f"/ws?access_token={TOKEN}&x=1",
        "/ws?access_token=opaque",
        f"Authorization: Bearer {TOKEN}",
        "authorization: bearer 0123456789abcdef-opaque",
        f"statuswire.v1, bearer.{TOKEN}",
        f"cookie: a=b; statuswire_token={TOKEN}; c=d",
        f"decoding {TOKEN} failed",
        {"headers": [f"statuswire_token={TOKEN}"]},
    ],
)
def test_tokens_never_appear(form: Any, text: Any) -> None:
    for line in (written(form, value=text), written(form, str(text)), written(form, exc_info=ValueError(str(text)))):
        assert "opaque" not in line
        assert not any(part in line for part in TOKEN.split("."))
        assert "***" in line
        if form == "json":
            json.loads(line)


def test_words_that_are_no_tokens_stay() -> None:
    assert written("plain", "a bearer token is needed").endswith("a bearer token is needed")


def test_printable() -> None:
    assert printable("a\x1b[1mb\n\u202e é…") == r"a\u001b[1mb\u000a\u202e é…"
