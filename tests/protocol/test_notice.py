"""Notifications as they are sent, as entries of the log, and on the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.messages import NotifyMessage, decode_client_message
from protocol.notice import (
    MAX_NOTICE,
    Notice,
    check_notice,
    decode_notice,
    event_data,
    heard,
    notice_entry,
    parse_channels,
    parse_username,
    presence_notice,
    reaches,
    target_of,
    targets_of,
    users_of,
)
from protocol.presence import PresenceEvent, Target
from protocol.sse import EventParser
from protocol.update import NOTIFICATION
from protocol.watch import NOTICES, channels_of
from protocol.wire import Framing, wire_form

IDS = st.text("abcXYZ019_.:@-", min_size=1, max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=10,
)
EVENTS = st.text(min_size=1, max_size=30).filter(
    lambda text: (
        text.isprintable() and text == text.strip() and text not in ("connected", "heartbeat", "reset", "error")
    )
)


def decode(**message: Any) -> Notice:
    return decode_notice(json.dumps({"target": "broadcast", "event": "e", "data": None} | message).encode())[0]


def refused(**message: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode(**message)
    return caught.value


@given(
    st.sampled_from(["client", "user", "channel"]), st.lists(IDS, min_size=1, max_size=5, unique=True), st.booleans()
)
def test_a_target_is_in_the_log_as_it_was_sent(kind: Any, ids: list[str], several: bool) -> None:
    target = Target(kind, (ids[0],))
    if several and kind != "client":
        target = Target(f"{kind}s", tuple(ids))  # type: ignore[arg-type]
    again = target_of(targets_of(target))
    assert again.ids == target.ids
    assert again.kind.removesuffix("s") == kind
    assert targets_of(again) == targets_of(target)


def test_a_broadcast_has_one_target() -> None:
    assert targets_of(Target("broadcast")) == ("broadcast",)
    assert target_of(("broadcast",)) == Target("broadcast")


@given(JSON, st.dictionaries(st.text(), JSON, max_size=3), EVENTS)
def test_any_json_and_any_name_come_through_every_framing(data: Any, metadata: dict[str, Any], event: str) -> None:
    entry = decode(event=event, data=data, metadata=metadata).entry(7, 1_700_000_000_123)
    assert (entry.type, entry.kind, entry.job_id, entry.user_id) == (NOTIFICATION, event, "", "")
    body = json.loads(entry.body)
    assert body == {"event": event, "data": data, "metadata": metadata, "timestamp": "2023-11-14T22:13:20.123Z"}
    assert json.loads(event_data(entry)) == {name: body[name] for name in ("data", "metadata", "timestamp")}
    assert b"\n" not in entry.body
    message = wire_form(Framing.JSON, frozenset({"progress"})).updates([entry], "abc")  # fields are for records
    assert json.loads(message) == {"type": "notification", "id": "abc:7"} | body
    (heard_event,) = EventParser().feed(wire_form(Framing.SSE).updates([entry], "abc"))
    assert (heard_event.event, heard_event.id) == (event, "abc:7")
    assert json.loads(heard_event.data) == json.loads(event_data(entry))
    held = wire_form(Framing.SSE).update(entry, "abc:9")
    assert EventParser().feed(held)[0].id == "abc:9"


def test_what_a_sender_says_twice_about_a_target_counts_once() -> None:
    assert decode(target="users", targetIds=["a", "b", "a"]).target == Target("users", ("a", "b"))
    assert decode(target="users", targetIds=[f"u{n % 1000}" for n in range(5000)]).target.ids[-1] == "u999"


def test_null_is_nothing() -> None:
    assert decode(targetId=None, targetIds=None, metadata=None) == decode()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"target": "users", "targetIds": ["a b"]}, "'a b' is not an id"),
        ({"target": "users", "targetIds": [1]}, "Expected `str`"),
        ({"target": "user", "targetIds": ["a"]}, "target 'user' takes targetId"),
        ({"target": "user"}, "needs it"),
        ({"target": "channels", "targetIds": []}, "needs at least one"),
        ({"target": "channel", "targetId": "presence:user:a"}, "tells on such channels who is there"),
        ({"targetId": "a"}, "for everyone"),
        ({"event": "a b\r"}, "one line"),
        ({"event": " a"}, "without space"),
        ({"event": "ü" * 65}, "128 bytes"),
        ({"event": "heartbeat"}, "choose another name"),
        ({"store": True}, "not for target 'broadcast'"),
        ({"data": "x" * 65_535}, "65536 bytes together"),
    ],
    ids=repr,
)
def test_refusals_say_what_to_do(message: dict[str, Any], words: str) -> None:
    error = refused(**message)
    assert (error.status, error.code) == (422, "invalid_field")
    assert words in error.message


def test_the_largest_one_fits() -> None:
    ids = [f"{number:0128d}" for number in range(1000)]
    text = json.dumps({"target": "users", "targetIds": ids, "event": "e", "data": "x" * 65_000, "store": True})
    assert len(text) < MAX_NOTICE
    notice, key = decode_notice(text.encode())
    assert key is None
    assert users_of(notice.entry(1, 0)) == ids


def test_the_same_message_over_websocket() -> None:
    text = '{"type":"notification","ref":1,"target":"user","targetId":"a","event":"e","data":{"x":1},"eventId":"k"}'
    message = decode_client_message(text)
    assert isinstance(message, NotifyMessage)
    assert check_notice(message) == decode(target="user", targetId="a", data={"x": 1})


def test_who_hears_it() -> None:
    entry = notice_entry(1, 0, "e", ("user/a", "user/b"), b"{}")
    assert users_of(entry) == ["a", "b"]
    assert reaches(entry, heard("c1", "a"))
    assert not reaches(entry, heard("a", "c", ["a", "b"]))
    assert reaches(notice_entry(1, 0, "e", ("channel/x",), b"{}"), heard(None, "a", ["x"]))
    assert not reaches(notice_entry(1, 0, "e", ("client/x",), b"{}"), heard(None, "x", ["x"]))
    assert reaches(notice_entry(1, 0, "e", ("broadcast",), b"{}"), heard(None, "a"))
    assert users_of(notice_entry(1, 0, "e", ("channel/x",), b"{}")) == []
    # No job's reader is offered it.
    assert channels_of(entry) == (NOTICES,)


def test_signatures_tell_what_differs() -> None:
    first = decode(data=1)
    assert first.signature == decode(data=1).signature
    others = [
        decode(data=2),
        decode(event="f", data=1),
        decode(data=1, metadata={"a": 1}),
        decode(target="user", targetId="a", data=1),
    ]
    assert len({notice.signature for notice in [first, *others]}) == 5


def test_presence_is_told_like_any_other() -> None:
    notice = presence_notice(PresenceEvent("join", "ann", "team", 3))
    assert (notice.target, notice.event) == (Target("channel", ("presence:team",)), "join")
    assert json.loads(bytes(notice.data)) == {"userId": "ann", "channel": "team", "count": 3}
    notice = presence_notice(PresenceEvent("leave", "ann", None, 0))
    assert notice.target == Target("channel", ("presence:user:ann",))
    assert json.loads(bytes(notice.data)) == {"userId": "ann", "count": 0}


def test_parameters() -> None:
    assert parse_channels({}) is None
    assert parse_channels({"channels": ""}) == []
    assert parse_channels({"channels": "a, b,a"}) == ["a", "b"]
    assert parse_username({}) is parse_username({"username": ""}) is None
    assert parse_username({"username": "Änne K."}) == "Änne K."
    for query in ({"channels": "a,,b"}, {"channels": "a/b"}, {"channels": ",".join(f"c{n}" for n in range(1001))}):
        with pytest.raises(ApiError) as caught:
            parse_channels(query)
        assert (caught.value.status, caught.value.field) == (400, "channels")
    for name in ("x" * 129, "a\nb", "ü" * 65):
        with pytest.raises(ApiError):
            parse_username({"username": name})
