"""The PROXY protocol, versions 1 and 2: how a TCP proxy says whose connection it passes on.

The specification is HAProxy's proxy-protocol.txt. The header comes first on a connection, before TLS, and there is no
telling whether it is missing: so it is asked for only of proxies that are known to send it, and anything that is not
exactly it is refused.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
# Section 2.1: the longest line, with its line end.
MAX_LINE: Final = 107
# After the sixteen bytes of version 2's head. Addresses take 216 at most; the rest are extensions, skipped here.
# The largest in use (a client certificate's names) have some hundreds.
MAX_REST: Final = 4096

_HEAD: Final = 16
_LINE = re.compile(rb"PROXY (TCP4|TCP6) ([0-9A-Fa-f.:]{2,45}) ([0-9A-Fa-f.:]{2,45}) ([0-9]{1,5}) ([0-9]{1,5})\r\n")
_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")
_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [\x20-\x7e]*)?\r\n")
# Transport to the bytes of its addresses and ports; of each, those of one address.
_STREAMS: Final = {0x11: (12, 4), 0x21: (36, 16), 0x31: (216, 108)}


class ProxyError(Exception):
    """This is no header of the PROXY protocol; the message says why."""


class Header(NamedTuple):
    """A whole header.

    Attributes:
        size: its bytes; what follows belongs to the connection.
        source: the client's IP address in its usual form; None if the proxy does not say (its own health checks,
            clients over a Unix socket): then the connection is the proxy's own.
    """

    size: int
    source: str | None


def parse_header(data: bytes) -> Header | None:
    """Read the header at the beginning of a connection.

    Args:
        data: everything that came so far.

    Returns:
        The header, or None while it is not whole.

    Raises:
        ProxyError: it is none, or not a usable one. Said as soon as it is sure, however the bytes were cut.
    """
    if data.startswith(SIGNATURE[:1]):
        return _binary(data)
    return _line(data)


def _line(data: bytes) -> Header | None:
    start = b"PROXY "
    if data[: len(start)] != start[: len(data)]:
        raise ProxyError("a proxy has to begin with a PROXY header, and this is something else")
    end = data.find(b"\n", 0, MAX_LINE)
    if end < 0:
        if len(data) >= MAX_LINE:
            raise ProxyError(f"the line is longer than {MAX_LINE} bytes")
        return None
    line = data[: end + 1]
    if _UNKNOWN.fullmatch(line):
        return Header(len(line), None)
    match = _LINE.fullmatch(line)
    if match is None:
        raise ProxyError("the line is malformed")
    family, source, target, *ports = match.groups()
    if any(not _PORT.fullmatch(port) or int(port) > 65535 for port in ports):
        raise ProxyError("a port is not one")
    kind = IPv4Address if family == b"TCP4" else IPv6Address
    try:
        kind(target.decode())
        return Header(len(line), str(kind(source.decode())))
    except ValueError:
        raise ProxyError(f"an address is not one of {family.decode()}") from None


def _binary(data: bytes) -> Header | None:
    if data[: len(SIGNATURE)] != SIGNATURE[: len(data)]:
        raise ProxyError("a proxy has to begin with a PROXY header, and this is something else")
    if len(data) > 12 and data[12] not in (0x20, 0x21):
        raise ProxyError("only version 2 with the commands LOCAL and PROXY is known")
    if len(data) < _HEAD:
        return None
    rest = int.from_bytes(data[14:16], "big")
    if rest > MAX_REST:
        raise ProxyError(f"the header is longer than {MAX_REST} bytes")
    local, transport = data[12] == 0x20, data[13]
    if not local and transport not in _STREAMS and transport != 0:
        raise ProxyError("it is not about a stream")
    needed, width = _STREAMS.get(transport, (0, 0))
    if not local and rest < needed:
        raise ProxyError("the addresses are cut off")
    if len(data) < _HEAD + rest:
        return None
    size = _HEAD + rest
    address = data[_HEAD : _HEAD + width]
    if local or width not in (4, 16):
        return Header(size, None)
    return Header(size, str(IPv4Address(address) if width == 4 else IPv6Address(address)))
