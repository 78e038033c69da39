"""Published updates: what is taken, and how precisely everything else is refused."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from protocol.errors import ApiError
from protocol.fields import (
    FIELD_NAMES,
    MAX_DEPTH,
    MAX_PAYLOAD,
    MAX_TEXT,
    MAX_UPDATE,
    SERVER_FIELDS,
    Steps,
    check_id,
    decode_fields,
    is_id,
    time_ms,
)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def refusal(data: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode_fields(data)
    return caught.value


def test_every_field_is_taken() -> None:
    update = {
        "jobId": "job_1",
        "userId": "u@x.org",
        "kind": "export",
        "status": "processing",
        "progress": 45.5,
        "stage": "pages",
        "message": "m",
        "currentOperation": "op",
        "steps": {"done": 1, "total": 3, "current": "p1", "failed": 0},
        "attempt": 2,
        "estimatedTimeRemaining": 9,
        "estimatedCompletionTime": "2025-01-31T12:00:00Z",
        "workerId": "w",
        "result": [1, None, {"x": "é"}],
        "error": "e",
        "metadata": {"k": [1.5]},
        "timestamp": "2025-01-31T12:00:00.25+02:00",
        "seq": 0,
        "ttl": 2.5,
        "eventId": "ev",
        "reset": True,
        "parentId": "p",
        "weight": 0.5,
        "autoComplete": False,
    }
    assert set(update) == set(FIELD_NAMES)
    fields = decode_fields(json.dumps(update).encode())
    assert UNSET not in [getattr(fields, name) for name in fields.__struct_fields__]
    assert bytes(fields.result) == '[1,null,{"x":"é"}]'.encode()
    assert isinstance(fields.steps, Steps)
    assert fields.steps.current == "p1"


def test_absent_and_null_differ() -> None:
    fields = decode_fields(b'{"stage":null,"metadata":null,"result":null}')
    assert (fields.stage, fields.metadata, fields.result, fields.message) == (None, None, None, UNSET)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, msgspec.Raw, msgspec.json.decode])
def test_any_form_of_json_is_read(wrap) -> None:  # type: ignore[no-untyped-def]
    assert decode_fields(wrap(b'{"progress":45}')).progress == 45


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        (b'{"progress":100.5}', "progress", "<= 100"),
        (b'{"progress":-1}', "progress", ">= 0"),
        (b'{"progress":"50"}', "progress", "a number"),
        (b'{"progress":true}', "progress", "a number"),
        (b'{"progress":null}', "progress", "a number"),
        (b'{"progress":1e999}', "progress", "out of range"),
        (b'{"attempt":0}', "attempt", ">= 1"),
        (b'{"attempt":1.5}', "attempt", "whole number"),
        (b'{"attempt":9223372036854775808}', "attempt", "<= 9223372036854775807"),
        (b'{"seq":-1}', "seq", ">= 0"),
        (b'{"seq":null}', "seq", "whole number"),
        (b'{"ttl":0}', "ttl", "> 0"),
        (b'{"ttl":604801}', "ttl", "<= 604800"),
        (b'{"weight":0}', "weight", "> 0"),
        (b'{"weight":1000000001}', "weight", "<= 1"),
        (b'{"estimatedTimeRemaining":-1}', "estimatedTimeRemaining", ">= 0"),
        (b'{"status":"running"}', "status", "queued, processing, stalled, completed, failed, cancelled"),
        (b'{"status":null}', "status", "a text"),
        (b'{"jobId":"a b"}', "jobId", "letters, digits"),
        (b'{"jobId":""}', "jobId", "1 to 128"),
        (b'{"jobId":"x\\n"}', "jobId", "1 to 128"),
        (b'{"userId":"%s"}' % (b"u" * 129), "userId", "1 to 128"),
        (b'{"jobId":"caf\xc3\xa9"}', "jobId", "1 to 128"),
        (b'{"parentId":null}', "parentId", "a text"),
        (b'{"eventId":""}', "eventId", ">= 1"),
        (b'{"error":{"code":1}}', "error", "a text or null"),
        (b'{"metadata":[1]}', "metadata", "an object or null"),
        (b'{"steps":{"done":-1}}', "steps.done", ">= 0"),
        (b'{"steps":5}', "steps", "an object or null"),
        (b'{"reset":1}', "reset", "true or false"),
        (b'{"timestamp":"yesterday"}', "timestamp", "RFC 3339"),
        (b'{"timestamp":"2025-01-31T12:00:00"}', "timestamp", "timezone"),
        (b'{"timestamp":"0001-01-01T00:00:00+01:00"}', "timestamp", "calendar"),
        (b'{"timestamp":1700000000}', "timestamp", "RFC 3339"),
        (b'{"estimatedCompletionTime":"9999-12-31T23:59:59-01:00"}', "estimatedCompletionTime", "calendar"),
        (b'{"result":%s}' % (b"9" * 5000), "result", "out of range"),
        (b'{"metadata":%s}' % nested(MAX_DEPTH + 1), "metadata", "deeper than 64"),
        (b'{"result":%s}' % nested(MAX_DEPTH + 1), "result", "deeper than 64"),
        (b'{"result":%s}' % (b"[" * 65 + b"]" * 65), "result", "deeper than 64"),
        (b'{"stage":"%s"}' % (b"x" * (MAX_TEXT + 1)), "stage", "2048"),
        (b'{"stage":"%s"}' % ("é" * (MAX_TEXT // 2) + "x").encode(), "stage", "2049"),
        (b'{"steps":{"current":"%s"}}' % ("é" * MAX_TEXT).encode(), "steps.current", "4096"),
        (b'{"result":"%s"}' % (b"x" * MAX_PAYLOAD), "result", "65536"),
        (b'{"metadata":{"a":"%s"}}' % (b"x" * MAX_PAYLOAD), "metadata", "65536"),
    ],
)
def test_a_bad_value_is_422_and_named(data: bytes, field: str, words: str) -> None:
    error = refusal(data)
    assert (error.status, error.code, error.field) == (422, "invalid_field", field)
    assert error.message.startswith(field + ": ")
    assert words in error.message


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        (b'{"progres":1}', "progres", "did you mean progress?"),
        (b'{"job_id":"x"}', "job_id", "did you mean jobId?"),
        (b'{"zzz":1}', "zzz", "known are jobId"),
        (b'{"steps":{"totl":1}}', "steps.totl", "did you mean total?"),
        (b'{"a`b":1}', "a`b", "no such field"),
        (b'{"%s":1}' % (b"k" * 500), "k" * 64 + "…", "no such field"),
    ],
)
def test_an_unknown_field_is_422_with_the_nearest(data: bytes, field: str, words: str) -> None:
    error = refusal(data)
    assert (error.status, error.code, error.field) == (422, "unknown_field", field)
    assert words in error.message


@pytest.mark.parametrize("name", sorted(SERVER_FIELDS))
def test_what_the_server_sets_says_so(name: str) -> None:
    error = refusal(json.dumps({name: 1}).encode())
    assert (error.status, error.field) == (422, name)
    assert "set by the server" in error.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{} {}",
        b"{'a':1}",
        b"1e400",
        b'{"progress":NaN}',
        b'{"progress":01}',
        b"\xef\xbb\xbf{}",
        b'{"stage":"\xff"}',
        b'{"stage":"\xed\xa0\x80"}',
        b'{"stage":"\\ud800"}',
        b'{"metadata":{"\\udc00":1}}',
        b'{"result":"\\udc00\\ud800"}',
        b'{"metadata":' + nested(20000),
        b'{"result":' + b"[" * 100000,
    ],
)
def test_what_is_no_json_is_400(data: bytes) -> None:
    error = refusal(data)
    assert (error.status, error.code) == (400, "malformed_json")


@pytest.mark.parametrize("data", [b"[]", b"3", b'"x"', b"null", b"true"])
def test_what_is_no_object_is_422(data: bytes) -> None:
    error = refusal(data)
    assert (error.status, error.code) == (422, "invalid_update")


def test_limits_are_exact() -> None:
    at_limit = '{"stage":"%s"}' % ("é" * (MAX_TEXT // 2))
    assert decode_fields(at_limit.encode()).stage == "é" * (MAX_TEXT // 2)
    payload = b'{"result":"%s"}' % (b"x" * (MAX_PAYLOAD - 2))
    assert len(decode_fields(payload).result) == MAX_PAYLOAD
    assert decode_fields(b'{"metadata":%s}' % nested(MAX_DEPTH)).metadata is not None
    many = json.dumps({"result": [[] for _ in range(1000)]}).encode()  # many brackets, no depth
    assert decode_fields(many).result is not None
    filled = b'{"progress":1%s}'
    assert decode_fields(filled % (b" " * (MAX_UPDATE - len(filled) + 2))).progress == 1
    error = refusal(filled % (b" " * (MAX_UPDATE - len(filled) + 3)))
    assert (error.status, error.code) == (413, "payload_too_large")


def test_result_and_metadata_count_together() -> None:
    half = "x" * (MAX_PAYLOAD // 2)
    error = refusal(json.dumps({"result": half, "metadata": {"m": half}}).encode())
    assert (error.status, error.field) == (422, "result")


def test_big_whole_numbers_survive() -> None:
    assert (
        bytes(decode_fields(b'{"result":123456789012345678901234567890}').result) == b"123456789012345678901234567890"
    )


@pytest.mark.parametrize(
    ("text", "good"), [("a", True), ("a" * 128, True), ("", False), ("a" * 129, False), ("a/b", False), ("a\n", False)]
)
def test_ids(text: str, good: bool) -> None:
    assert is_id(text) is good
    if good:
        assert check_id(text, "userId") == text
    else:
        with pytest.raises(ApiError) as caught:
            check_id(text, "userId")
        assert caught.value.field == "userId"


def test_times_become_unix_milliseconds() -> None:
    moment = decode_fields(b'{"timestamp":"1970-01-01T02:00:01.5+02:00"}').timestamp
    assert moment is not UNSET
    assert time_ms(moment, "timestamp") == 1500


def outcome(data: bytes) -> ApiError | None:
    try:
        decode_fields(data)
    except ApiError as error:
        return error
    return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(FIELD_NAMES) | st.text(max_size=8), json_values, max_size=6))
def test_any_object_is_taken_or_refused_by_name(update: dict[str, object]) -> None:
    try:
        data = json.dumps(update, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        data = json.dumps(update).encode()
    error = outcome(data)
    assert error is None or error.status in (400, 413) or (error.status == 422 and error.field is not None)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    error = outcome(data)
    assert error is None or error.status in (400, 422)
