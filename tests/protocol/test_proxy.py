"""The PROXY protocol's header: what is one, what is none, however it is cut."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.proxy import MAX_LINE, MAX_REST, SIGNATURE, Header, ProxyError, parse_header

PORTS = st.integers(0, 65535)


def binary(command: int, transport: int, rest: bytes) -> bytes:
    return SIGNATURE + struct.pack(">BBH", 0x20 | command, transport, len(rest)) + rest


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A good header and the source that it names."""
    six = draw(st.booleans())
    source, target = draw(st.lists(st.ip_addresses(v=6 if six else 4), min_size=2, max_size=2))
    ports = draw(PORTS), draw(PORTS)
    extensions = draw(st.binary(max_size=64))
    known = str(source)
    both = source.packed + target.packed + struct.pack(">HH", *ports) + extensions
    kind = draw(st.sampled_from(["line", "unknown", "binary", "local", "unspecified", "unix"]))
    match kind:
        case "line":
            return f"PROXY TCP{6 if six else 4} {source} {target} {ports[0]} {ports[1]}\r\n".encode(), known
        case "unknown":
            return draw(st.sampled_from([b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ffff::1 x 1 2\r\n"])), None
        case "binary":
            return binary(1, 0x21 if six else 0x11, both), known
        case "local":
            return binary(0, draw(st.integers(0, 255)), both), None
        case "unspecified":
            return binary(1, 0, extensions), None
        case _:
            return binary(1, 0x31, bytes(216) + extensions), None


@given(headers(), st.binary(max_size=30))
def test_a_header_is_read_whole_and_not_before(made: tuple[bytes, str | None], behind: bytes) -> None:
    data, source = made
    assert parse_header(data + behind) == Header(len(data), source)
    for size in range(len(data)):
        assert parse_header(data[:size]) is None


@given(headers(), st.data())
def test_a_spoilt_header_is_never_taken_for_another_address(
    made: tuple[bytes, str | None], data: st.DataObject
) -> None:
    """Nothing but a complaint, a wait for more, or a header that is good as it stands."""
    good, _ = made
    at = data.draw(st.integers(0, len(good) - 1))
    spoilt = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    try:
        header = parse_header(spoilt)
    except ProxyError:
        return
    if header is not None and header.source is not None:
        assert str(IPv6Address(header.source) if ":" in header.source else IPv4Address(header.source)) == header.source
        assert 0 < header.size <= len(spoilt)


@given(st.binary(max_size=MAX_LINE + 30))
def test_once_refused_always_refused(data: bytes) -> None:
    refused = False
    for size in range(len(data) + 1):
        try:
            header = parse_header(data[:size])
        except ProxyError:
            refused = True
        else:
            assert not refused, "what was refused in part must not be taken whole"
            if header is not None:
                return


@given(st.binary(max_size=64))
def test_nobody_is_waited_for_for_ever(data: bytes) -> None:
    data = data.ljust(MAX_REST + 17, b"1")
    for start in (b"", b"PROXY ", b"PROXY TCP4 1", SIGNATURE, SIGNATURE + b"\x21\x11"):
        with suppress(ProxyError):
            assert parse_header(start + data) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY  TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n",
        b"PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP6 ::1%lo ::1 1 2\r\n",
        b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY UNKNOWN\n",
        b"PROXY UNKNOWN " + b"x" * MAX_LINE,
        b"PROXY TCP4 " + b"1" * MAX_LINE,
        b"\x16\x03\x01",
        SIGNATURE[:-1] + b"\r",
        SIGNATURE + b"\x11\x11\0\x0c",  # version 1
        SIGNATURE + b"\x22\x11\0\x0c",  # a command that there is not
        SIGNATURE + b"\x21\x12\0\x0c",  # datagrams
        SIGNATURE + b"\x21\x41\0\x0c",  # a family that there is not
        SIGNATURE + b"\x21\x11\0\x0b",  # too short for its addresses
        SIGNATURE + b"\x21\x21\0\x23",
        SIGNATURE + struct.pack(">BBH", 0x21, 0x11, MAX_REST + 1),
    ],
)
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(ProxyError):
        parse_header(data)


def test_the_longest_line_is_one() -> None:
    longest = b"PROXY UNKNOWN " + b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff " * 2 + b"65535 65535\r\n"
    assert len(longest) == MAX_LINE
    assert parse_header(longest) == Header(MAX_LINE, None)


def test_addresses_have_one_spelling() -> None:
    assert parse_header(b"PROXY TCP6 0:0:0:0:0:0:0:1 ::1 1 2\r\n") == Header(36, "::1")
    data = binary(1, 0x21, socket.inet_pton(socket.AF_INET6, "2001:DB8::1") * 2 + b"\0\1\0\2")
    assert parse_header(data) == Header(len(data), "2001:db8::1")
