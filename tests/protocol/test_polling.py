from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.polling import parse_client_id, parse_timeout, poll_body
from protocol.wire import json_list


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, 30.0), ("0", 0.0), ("1.5", 1.5), ("60", 60.0), ("61", 60.0), ("1e9", 60.0), ("1e999", 60.0)],
)
def test_timeout(text: str | None, seconds: float) -> None:
    assert parse_timeout({} if text is None else {"timeout": text}) == seconds


@pytest.mark.parametrize(
    "text", ["", "-0", "inf", "1_0", " 5", "-1", "-0.001", "nan", "NaN", "-inf", "soon", "1,5", "0x10", "1 s"]
)
def test_wrong_timeouts_are_named(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_timeout({"timeout": text})
    assert (caught.value.status, caught.value.code, caught.value.field) == (400, "invalid_parameter", "timeout")


def test_client_id() -> None:
    assert parse_client_id({}) is None
    assert parse_client_id({"client_id": "tab-1"}) == "tab-1"
    for wrong in ("", "a b", "a/b", "x" * 129, "ä"):
        with pytest.raises(ApiError) as caught:
            parse_client_id({"client_id": wrong})
        assert (caught.value.status, caught.value.field) == (400, "client_id")


@pytest.mark.parametrize("flags", [(False, False, False), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_body(count: int, flags: tuple[bool, bool, bool]) -> None:
    reset, timed_out, done = flags
    messages = [b'{"n":%d}' % number for number in range(count)]
    body = b"".join(poll_body(messages, last_seen="e:5", reset=reset, timed_out=timed_out, done=done))
    assert json.loads(body) == {
        "updates": [{"n": number} for number in range(count)],
        "last_seen": "e:5",
        "reset": reset,
        "timedOut": timed_out,
        "done": done,
    }


@given(st.lists(st.binary(max_size=30)), st.integers(1, 50))
def test_a_list_in_pieces_is_the_list(parts: list[bytes], piece_bytes: int) -> None:
    pieces = list(json_list(iter(parts), b"before", b"after", piece_bytes))
    assert b"".join(pieces) == b"before[" + b",".join(parts) + b"]after"
    # No piece is more than a part longer than it should be.
    assert all(len(piece) <= piece_bytes + 50 for piece in pieces)
