from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.messages import (
    MAX_KINDS,
    MAX_MIN_INTERVAL_MS,
    SNAPSHOT_PART_BYTES,
    Ack,
    AuthMessage,
    Get,
    PingMessage,
    PublishMessage,
    Subscribe,
    Unsubscribe,
    decode_client_message,
    error_message,
    min_interval_s,
    ref_of,
    server_message,
    snapshot_parts,
    split_ids,
    subscribe_fields,
    subscribe_filter,
    whole,
)
from protocol.watch import ANY, Filter


def subscribe(**fields: Any) -> Subscribe:
    message = decode_client_message(json.dumps({"type": "subscribe"} | fields))
    assert isinstance(message, Subscribe)
    return message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"type":"subscribe"}', Subscribe),
        ('{"type":"unsubscribe","jobIds":["a"]}', Unsubscribe),
        ('{"type":"get","jobIds":[]}', Get),
        ('{"type":"publish","updates":[{},5,"x"]}', PublishMessage),
        ('{"type":"ack","id":"e:1"}', Ack),
        ('{"type":"auth","token":"x"}', AuthMessage),
        ('{"ref":"r","type":"ping"}', PingMessage),
    ],
)
def test_every_message_a_client_may_send(text: str, kind: type) -> None:
    assert type(decode_client_message(text)) is kind
    assert type(decode_client_message(text.encode())) is kind


def test_all_fields_of_a_subscribe() -> None:
    message = subscribe(
        jobIds=["a"], userId="u", all=True, types=["job_failed"], kind="a,b", status=["queued"], fields=["progress"],
        last_seen="e:1", minInterval=500, ref=3,
    )  # fmt: skip
    assert (message.job_ids, message.user_id, message.all) == (["a"], "u", True)
    assert (message.last_seen, message.ref) == ("e:1", 3)
    assert subscribe_filter(message) == Filter(frozenset({"job_failed"}), frozenset({"a", "b"}), frozenset({"queued"}))
    assert subscribe_fields(message) == {"progress"}
    assert min_interval_s(message) == 0.5


def test_what_a_subscribe_leaves_out() -> None:
    message = subscribe()
    assert subscribe_filter(message) == ANY
    assert subscribe_fields(message) is None
    assert min_interval_s(message) is None
    assert min_interval_s(subscribe(minInterval=0)) == 0.0
    assert subscribe_filter(subscribe(kind=[])) == Filter(kinds=frozenset())


@pytest.mark.parametrize(
    ("text", "status", "field"),
    [
        ("", 400, None),
        ("{", 400, None),
        ('{"type":"ping"} x', 400, None),
        ("\ud800", 400, None),
        ('{"a":' * 100_000, 400, None),
        ("null", 422, None),
        ("[]", 422, None),
        ("{}", 422, "type"),
        ('{"type":null}', 422, "type"),
        ('{"type":"dance"}', 422, "type"),
        ('{"type":"get"}', 422, "jobIds"),
        ('{"type":"get","jobIds":[1]}', 422, "jobIds[0]"),
        ('{"type":"ping","extra":1}', 422, "extra"),
        ('{"type":"ping","ref":1.5}', 422, "ref"),
        ('{"type":"ping","ref":[]}', 422, "ref"),
        ('{"type":"subscribe","job_ids":[]}', 422, "job_ids"),
        ('{"type":"subscribe","all":1}', 422, "all"),
        ('{"type":"publish","updates":{}}', 422, "updates"),
    ],
)
def test_wrong_messages(text: str, status: int, field: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        decode_client_message(text)
    assert (caught.value.status, caught.value.field) == (status, field)
    assert caught.value.code == ("malformed_json" if status == 400 else "invalid_field")
    assert caught.value.message
    assert field is None or field.partition("[")[0] in caught.value.message


@given(st.text() | st.binary())
def test_nothing_but_api_errors(text: str | bytes) -> None:
    ref_of(text)
    with suppress(ApiError):
        decode_client_message(text)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ('{"type":"dance","ref":"r"}', "r"),
        ('{"ref":7,"jobIds":[[[[]]]]}', 7),
        ('{"ref":1.5}', None),
        ("{}", None),
        ("[]", None),
        ('{"ref":"r"', None),
        ('{"ref":"r","x":' + "[" * 100_000, None),
        ("\ud800", None),
    ],
)
def test_the_ref_of_a_wrong_message(text: str, ref: object) -> None:
    assert ref_of(text) == ref


@pytest.mark.parametrize("value", [-1, MAX_MIN_INTERVAL_MS + 1, -0.1, 1e300])
def test_intervals_out_of_range(value: float) -> None:
    with pytest.raises(ApiError) as caught:
        min_interval_s(subscribe(minInterval=value))
    assert (caught.value.status, caught.value.field) == (422, "minInterval")
    assert min_interval_s(subscribe(minInterval=MAX_MIN_INTERVAL_MS)) == 60.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("types", ["job_started"]),
        ("status", "done"),
        ("status", ["queued", ""]),
        ("fields", ["x"]),
        ("kind", ["k" * (MAX_KINDS - 3), "four"]),
        ("kind", "k" * (MAX_KINDS + 1)),
    ],
)
def test_wrong_words_are_named(field: str, value: object) -> None:
    message = subscribe(**{field: value})
    with pytest.raises(ApiError) as caught:
        subscribe_fields(message) if field == "fields" else subscribe_filter(message)
    assert (caught.value.status, caught.value.field) == (422, field)


def test_ids_are_split_into_good_and_denied() -> None:
    assert split_ids(["a", "b", "a", "c d", "", "x" * 300], 5) == (["a", "b"], ["c d", "", "x" * 128])
    assert split_ids(["a", "b", "c"], 2) == (["a", "b"], ["c"])
    assert split_ids(["a"], 0) == ([], ["a"])
    assert split_ids(["a"], -1) == ([], ["a"])
    assert split_ids([], 5) == ([], [])
    # A bad one takes no room, and neither does what is watched already.
    assert split_ids(["?", "a"], 1) == (["a"], ["?"])
    assert split_ids(["new", "old", "newer", "older"], 1, lambda job_id: "old" in job_id) == (
        ["new", "old", "older"],
        ["newer"],
    )


def test_server_messages_leave_out_what_is_none() -> None:
    assert server_message("pong", ref=None, timestamp="t") == b'{"type":"pong","timestamp":"t"}'
    assert server_message("pong", ref=0) == b'{"type":"pong","ref":0}'


def test_error_messages() -> None:
    error = ApiError(422, "invalid_field", "x: bad", field="x")
    assert json.loads(error_message(error, "r")) == {
        "type": "error", "code": "invalid_field", "message": "x: bad", "field": "x", "ref": "r",
    }  # fmt: skip
    assert json.loads(error_message(ApiError(503, "try_later", "no"))) == {
        "type": "error", "code": "try_later", "message": "no",
    }  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), [(30.0, "30"), (0.05, "0.05"), (1e6, "1000000"), (2.5, "2.5")])
def test_whole_numbers_are_shown_as_such(value: float, shown: str) -> None:
    assert json.dumps(whole(value)) == shown


def test_a_small_snapshot_is_one_message() -> None:
    parts = list(snapshot_parts([b'{"a":1}', b"{}"], "jobs", b'{"type":"snapshot"}', b"{}"))
    assert parts == [(b'{"type":"snapshot","jobs":[{"a":1},{}]}', True)]
    parts = list(snapshot_parts([], "snapshot", b'{"type":"subscribed","ref":1}', b'{"id":"e:1"}'))
    assert parts == [(b'{"type":"subscribed","ref":1,"snapshot":[],"id":"e:1"}', True)]


def test_a_record_that_takes_its_time_is_an_empty_message_on_the_way() -> None:
    parts = list(snapshot_parts([b"", b"1", b"", b"", b"2", b""], "jobs", b'{"type":"snapshot"}', b"{}"))
    assert parts == [(b"", False)] * 4 + [(b'{"type":"snapshot","jobs":[1,2]}', True)]


@given(st.lists(st.integers(1, SNAPSHOT_PART_BYTES + 10), max_size=8))
def test_a_large_snapshot_is_cut_between_records(sizes: list[int]) -> None:
    records = [b'"' + b"x" * size + b'"' for size in sizes]
    parts = list(snapshot_parts(iter(records), "jobs", b'{"type":"t"}', b'{"id":1}'))
    messages = [json.loads(message) for message, _ in parts]
    assert [job for message in messages for job in message["jobs"]] == [json.loads(record) for record in records]
    assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]
    assert all(message.get("more") is True and "id" not in message for message in messages[:-1])
    assert "more" not in messages[-1]
    assert messages[-1]["id"] == 1
    for text, message in zip([text for text, _ in parts], messages, strict=True):
        assert len(text) <= SNAPSHOT_PART_BYTES + 100 or len(message["jobs"]) == 1
    # No part could have taken the first record of the next.
    for before, after in pairwise(messages):
        assert sum(len(job) + 2 for job in before["jobs"]) + len(after["jobs"][0]) + 2 > SNAPSHOT_PART_BYTES
