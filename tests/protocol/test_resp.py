"""RESP: any split of the bytes gives the same replies, and errors are values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.resp import Argument, ProtocolError, RedisError, Replies, encode


def written(value: Any) -> bytes:
    """A reply as a server writes it ("RESP protocol description")."""
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    if isinstance(value, str):
        return b"-" + value.encode() + b"\r\n"
    return b"*%d\r\n" % len(value) + b"".join(map(written, value))


def plain(value: Any) -> Any:
    """A parsed reply with errors as their text, to compare."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.message if isinstance(value, RedisError) else value


scalars = st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=40) | st.sampled_from(["ERR no", "OOM x"])
replies = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@given(st.lists(replies, max_size=6), st.lists(st.integers(0, 400), max_size=8))
def test_any_split_gives_the_same_replies(values: list[Any], cuts: list[int]) -> None:
    data = b"".join(map(written, values))
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    parser = Replies()
    parsed = [value for start, end in pairwise(edges) for value in parser.feed(data[start:end])]
    assert plain(parsed) == values


@given(st.lists(replies, min_size=1, max_size=3))
def test_byte_by_byte(values: list[Any]) -> None:
    parser = Replies()
    data = b"".join(map(written, values))
    assert plain([value for at in range(len(data)) for value in parser.feed(data[at : at + 1])]) == values


def test_pushes_and_maps_of_resp3_are_read() -> None:
    assert Replies().feed(b">2\r\n+message\r\n$1\r\nx\r\n%1\r\n+a\r\n:1\r\n_\r\n#t\r\n") == [
        [b"message", b"x"],
        {b"a": 1},
        None,
        True,
    ]


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$x\r\n", b"\x15\x03\x01\x00\x02", b":1x\r\n"])
def test_what_is_not_resp_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Replies().feed(data)


def by_hand(command: list[Argument]) -> bytes:
    parts = [part.encode() if isinstance(part, str) else part for part in command]
    texts = [part if isinstance(part, bytes) else repr(part).encode() for part in parts]
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%b\r\n" % (len(text), text) for text in texts)


@given(st.lists(st.binary() | st.text() | st.integers() | st.floats(), min_size=1))
def test_commands_are_arrays_of_bulk_strings(command: list[Argument]) -> None:
    assert encode(command) == by_hand(command)


@pytest.mark.parametrize("argument", [None, True, ["x"], object()])
def test_other_arguments_are_refused(argument: Any) -> None:
    with pytest.raises(TypeError):
        encode(("SET", "key", argument))


@pytest.mark.parametrize(
    ("line", "code", "refused"),
    [
        ("ERR unknown command", "ERR", False),
        ("WRONGTYPE Operation against a key", "WRONGTYPE", False),
        ("NOSCRIPT No matching script.", "NOSCRIPT", True),
        ("LOADING Redis is loading", "LOADING", True),
        ("READONLY You can't write", "READONLY", True),
        ("OOM command not allowed", "OOM", True),
        ("CLUSTERDOWN Hash slot not served", "CLUSTERDOWN", True),
        ("MASTERDOWN Link with MASTER is down", "MASTERDOWN", True),
        ("BUSY Redis is busy", "BUSY", True),
        ("NOAUTH Authentication required.", "NOAUTH", True),
        ("WRONGPASS invalid", "WRONGPASS", True),
        ("TRYAGAIN", "TRYAGAIN", True),
        ("something else", "ERR", False),
        ("Mixed case", "ERR", False),
        ("", "ERR", False),
    ],
)
def test_codes(line: str, code: str, refused: bool) -> None:
    (error,) = Replies().feed(b"-" + line.encode() + b"\r\n")
    assert isinstance(error, RedisError)
    assert (error.code, error.refused, error.message, str(error)) == (code, refused, line, line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("MOVED 3999 127.0.0.1:6381", (3999, "127.0.0.1", 6381)),
        ("ASK 0 redis-1.example:7000", (0, "redis-1.example", 7000)),
        ("MOVED 1 :7001", (1, "", 7001)),
        ("MOVED 1 ::1:7001", (1, "::1", 7001)),
        ("MOVED 1 [::1]:7001", (1, "::1", 7001)),
        ("MOVED 1", None),
        ("MOVED x 127.0.0.1:1", None),
        ("ERR 1 127.0.0.1:1", None),
    ],
)
def test_redirections(line: str, expected: tuple[int, str, int] | None) -> None:
    assert RedisError(line).redirection() == expected
