"""The WebSocket handshake and incoming messages of a server (RFC 6455, RFC 7692).

The handshake is done by hand from the parsed request: wsproto's own would parse it a second time and lets
pass what RFC 6455 section 4.2.1 forbids. Incoming frames go through wsproto's ``Connection``; outgoing ones
are in ``protocol.frames``.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Message
from wsproto.events import Ping as WsprotoPing
from wsproto.events import Pong as WsprotoPong
from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits

from protocol.errors import ApiError, CloseCode
from protocol.frames import SMALL_WINDOW_BITS, WINDOW_BITS, close_frame

if TYPE_CHECKING:
    from protocol.request import Request

_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TOKEN_ONLY = re.compile(_TOKEN)
# One element of Sec-WebSocket-Extensions and one parameter of it (RFC 6455 section 9.1). A quoted value must
# be a token after unescaping; none that we know needs an escape, so a backslash makes the offer unknown.
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*(?:=\s*(?:({_TOKEN})|"({_TOKEN})")\s*)?')
_OFFER = re.compile(r'(?:[^,"]|"[^"]*"?)+')  # up to a comma outside quotes; linear, whatever is sent

# Whoever sends Upgrade must name it in Connection, too (RFC 9110 section 7.8).
_UPGRADE_HEADERS = (("Sec-WebSocket-Version", "13"), ("Upgrade", "websocket"), ("Connection", "Upgrade"))


@dataclass(frozen=True, slots=True)
class DeflateParameters:
    """What was agreed on for permessage-deflate; neither side keeps its context (RFC 7692 section 7.1)."""

    server_max_window_bits: int | None = None
    """Bits in the answer if the offer asked for a limit: ``WINDOW_BITS`` or ``SMALL_WINDOW_BITS``."""

    @property
    def window_bits(self) -> int:
        """The window to compress with."""
        return self.server_max_window_bits or WINDOW_BITS

    def header(self) -> str:
        """The element of ``Sec-WebSocket-Extensions`` that answers the offer."""
        answer = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        if self.server_max_window_bits is not None:
            answer += f"; server_max_window_bits={self.server_max_window_bits}"
        return answer


class Handshake(NamedTuple):
    """An acceptable opening handshake."""

    headers: list[tuple[str, str]]
    """All headers of the 101 answer but Date."""
    protocol: str | None
    """The subprotocol in ``headers``."""
    offered: tuple[str, ...]
    """The subprotocols that the client named, in its order."""
    deflate: DeflateParameters | None


def accept_handshake(
    request: Request, *, protocols: Sequence[str], echo_prefix: str | None = None, deflate: bool
) -> Handshake:
    """Check an opening handshake and make its answer (RFC 6455 sections 4.2.1 and 4.2.2).

    Args:
        protocols: subprotocols of ours, best first; the first that is offered is chosen.
        echo_prefix: where none of those is offered, the first offered one that begins so is chosen, e.g.
            ``"bearer."``: a browser drops a connection whose offers were all passed over.
        deflate: whether permessage-deflate may be agreed on.

    Raises:
        ApiError: 405 other than GET, 426 no upgrade asked for or other than version 13, 400 all else.
    """
    headers = request.headers
    if request.method != "GET":
        raise ApiError(405, "method_not_allowed", "a WebSocket is opened with GET", headers=(("Allow", "GET"),))
    if request.http_version != "1.1":
        raise _bad_handshake(f"a WebSocket needs HTTP/1.1, not HTTP/{request.http_version}")
    if not _asks_for_websocket(headers.get("upgrade"), headers.get("connection")):
        raise ApiError(
            426,
            "upgrade_required",
            "this is a WebSocket: send 'Connection: Upgrade' and 'Upgrade: websocket'",
            headers=_UPGRADE_HEADERS,
        )
    version = headers.get("sec-websocket-version")
    if version != "13":
        raise ApiError(
            426, "unsupported_version", f"Sec-WebSocket-Version must be 13, not {version!r}", headers=_UPGRADE_HEADERS
        )
    key = headers.get("sec-websocket-key", "")
    if _KEY.fullmatch(key) is None:  # nor do two keys match, joined as they are with a comma
        raise _bad_handshake("there must be one Sec-WebSocket-Key: 16 bytes in base64")
    if request.has_body:  # its bytes would be taken for frames
        raise _bad_handshake("a WebSocket handshake has no body")

    offered = _offered_protocols(headers.get("sec-websocket-protocol"))
    protocol = _choose(offered, protocols, echo_prefix) if offered else None
    parameters = _accept_deflate(headers.get("sec-websocket-extensions", "")) if deflate else None

    accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()
    answer = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)]
    if protocol is not None:
        answer.append(("Sec-WebSocket-Protocol", protocol))
    if parameters is not None:
        answer.append(("Sec-WebSocket-Extensions", parameters.header()))
    return Handshake(answer, protocol, offered, parameters)


def _choose(offered: Sequence[str], protocols: Sequence[str], echo_prefix: str | None) -> str | None:
    for name in protocols:
        if name in offered:
            return name
    if echo_prefix is not None:
        for name in offered:
            if name.startswith(echo_prefix):
                return name
    return None


def _bad_handshake(message: str) -> ApiError:
    return ApiError(400, "bad_handshake", message)


@lru_cache(maxsize=64)  # nearly all clients say it in one of a few ways
def _asks_for_websocket(upgrade: str | None, connection: str | None) -> bool:
    return _has_token(upgrade, "websocket") and _has_token(connection, "upgrade")


def _has_token(value: str | None, token: str) -> bool:
    return value is not None and any(part.strip().lower() == token for part in value.split(","))


def _offered_protocols(value: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    names = [name for part in value.split(",") if (name := part.strip(" \t"))]
    if not names or not all(map(_TOKEN_ONLY.fullmatch, names)):
        raise _bad_handshake("Sec-WebSocket-Protocol must be a list of tokens")
    return tuple(dict.fromkeys(names))


@lru_cache(maxsize=64)
def _accept_deflate(value: str) -> DeflateParameters | None:
    """The first acceptable offer of permessage-deflate (RFC 7692 section 5.1), or None.

    A list that breaks the grammar is declined like an offer we do not know: no handshake fails for the sake
    of something optional.
    """
    if "permessage-deflate" not in value.lower():
        return None
    for offer in _OFFER.findall(value):
        name, *parameters = offer.split(";")
        if name.strip().lower() == "permessage-deflate":
            accepted = _accept_offer(parameters)
            if accepted is not None:
                return accepted
    return None


def _accept_offer(parameters: Sequence[str]) -> DeflateParameters | None:
    """RFC 7692 section 7: decline unknown and repeated parameters and invalid values."""
    seen: dict[str, str | None] = {}
    for parameter in parameters:
        match = _PARAMETER.fullmatch(parameter)
        if match is None or match[1].lower() in seen:
            return None
        seen[match[1].lower()] = match[2] or match[3]

    for name in ("server_no_context_takeover", "client_no_context_takeover"):
        if seen.pop(name, None) is not None:
            return None
    # We need no limit on the client's window: what is left out of the answer lets it use all 15 bits.
    client_bits = seen.pop("client_max_window_bits", None)
    if client_bits is not None and _window_bits(client_bits) is None:
        return None
    if "server_max_window_bits" not in seen:
        return None if seen else DeflateParameters()
    # Compressed frames are shared, so there are two windows only, and the answer is the larger one that fits
    # (RFC 7692 section 7.1.2.1 permits any smaller value). zlib cannot do 8: decline.
    server_bits = _window_bits(seen.pop("server_max_window_bits") or "")
    if seen or server_bits is None or server_bits < SMALL_WINDOW_BITS:
        return None
    return DeflateParameters(WINDOW_BITS if server_bits >= WINDOW_BITS else SMALL_WINDOW_BITS)


def _window_bits(value: str) -> int | None:
    """RFC 7692 section 7.1.2: 8 to 15 in decimal, no leading zeros."""
    return int(value) if value in ("8", "9", "10", "11", "12", "13", "14", "15") else None


class Text(msgspec.Struct, frozen=True, gc=False):
    """A whole text message."""

    data: str


class Binary(msgspec.Struct, frozen=True, gc=False):
    """A whole binary message."""

    data: bytes


class Ping(msgspec.Struct, frozen=True, gc=False):
    """Answer with ``frames.pong_frame(payload)``; of several, only the last needs one (section 5.5.3)."""

    payload: bytes


class Pong(msgspec.Struct, frozen=True, gc=False):
    """An answer to a ping of ours, or unasked for."""

    payload: bytes


class CloseReceived(msgspec.Struct, frozen=True, gc=False):
    """The client closes, or answers our close frame; the last event of a connection."""

    code: int
    """Close code; 1005 where the frame had none."""
    reason: str


Event = Text | Binary | Ping | Pong | CloseReceived


class WebSocketError(Exception):
    """The client broke the protocol or a limit: send ``close_frame(code, reason)`` and close the connection.

    Attributes:
        code: close code to send: 1002, 1007 or 1009.
        reason: what was wrong, for people.
        events: complete events that came in front of the mistake in the same bytes.
    """

    def __init__(self, code: CloseCode, reason: str, events: Sequence[Event] = ()) -> None:
        super().__init__(f"{int(code)} {reason}")
        self.code = code
        self.reason = reason
        self.events = list(events)


def close_reply(event: CloseReceived) -> bytes:
    """The close frame that answers the client's: its code, or none if it gave none (section 5.5.1).

    Only if we have not sent a close frame ourselves: then the handshake is complete and nothing is answered.
    """
    return close_frame(None if event.code == 1005 else event.code)


class WebSocketReader:
    """The incoming side of one WebSocket connection: bytes in, whole messages and control frames out.

    A text message in one frame that is all there, as nearly all are, is read here: 1.5 µs instead of 20. All else, what
    is wrong included, is wsproto's, whose dozen of objects (2 KB) are there only while something is half received.
    """

    __slots__ = ("_connection", "_deflate", "_intake", "_max_message", "_over", "_partial")

    def __init__(self, deflate: DeflateParameters | None, max_message: int) -> None:
        """
        Args:
            deflate: as agreed on in the handshake.
            max_message: largest message in bytes, after decompression.
        """
        self._deflate = deflate is not None
        self._max_message = max_message
        self._connection: Connection | None = None
        self._intake: _Intake | None = None
        self._partial: bytearray | None = None  # a message of which something is still to come, as UTF-8 or bytes
        self._over = False

    def receive(self, data: bytes) -> list[Event]:
        """Take the next bytes, in any portions; returns the events that are complete by now.

        After ``CloseReceived`` and after an error whatever comes is ignored (section 1.4, section 7.1.7).

        Raises:
            WebSocketError: at the first byte that cannot be right. It carries the events before that byte.
        """
        if self._over or not data:
            return []
        events: list[Event] = []
        if self._connection is None:
            taken = _take_texts(data, self._max_message, events)
            if taken == len(data):
                return events
            data = data[taken:]
            self._intake = _Intake(self._deflate, self._max_message)
            self._connection = Connection(ConnectionType.SERVER, [self._intake])
        try:
            self._connection.receive_data(data)
            for event in self._connection.events():
                if isinstance(event, Message):
                    message = self._message(event)
                    if message is not None:
                        events.append(message)
                elif isinstance(event, WsprotoPing):
                    events.append(Ping(bytes(event.payload)))
                elif isinstance(event, WsprotoPong):
                    events.append(Pong(bytes(event.payload)))
                else:
                    assert isinstance(event, CloseConnection)
                    self._close(event, events)
        except WebSocketError:
            raise
        except Exception as error:
            # Whatever wsproto raises instead of reporting, bytes from the network made it do so.
            self._drop()
            raise WebSocketError(CloseCode.PROTOCOL_ERROR, str(error), events) from error
        if self._intake is not None and self._intake.at_rest():
            self._connection = self._intake = None  # 2 KB less while nothing is half received
        return events

    @property
    def unfinished(self) -> int:
        """Bytes of a message of which something is still to come."""
        return 0 if self._partial is None else len(self._partial)

    def _message(self, event: Message) -> Event | None:  # type: ignore[type-arg]
        """Join the pieces: one bytearray, since a list of a million tiny strings would dwarf the message."""
        data: str | bytes | bytearray = event.data
        if self._partial is None:
            if event.message_finished:
                return Text(data) if isinstance(data, str) else Binary(bytes(data))
            self._partial = bytearray()
        self._partial += data.encode() if isinstance(data, str) else data
        if not event.message_finished:
            return None
        partial, self._partial = self._partial, None
        return Text(partial.decode()) if isinstance(data, str) else Binary(bytes(partial))

    def _close(self, event: CloseConnection, events: list[Event]) -> None:
        assert self._connection is not None
        assert self._intake is not None
        failed = self._connection.state is ConnectionState.OPEN  # wsproto reports a mistake as a close, too
        problem = self._intake.problem
        self._drop()
        if not failed:
            events.append(CloseReceived(int(event.code), event.reason or ""))
            return
        raise WebSocketError(CloseCode(event.code), problem or event.reason or "", events)

    def _drop(self) -> None:
        self._over = True
        self._connection = self._intake = self._partial = None


def _take_texts(data: bytes, max_message: int, events: list[Event]) -> int:
    """Read whole text messages of one uncompressed frame each, up to the first bytes that are anything else.

    Returns how many bytes that were. Nothing is judged here: who would have something to say of a frame is wsproto.
    """
    start, end = 0, len(data)
    while end - start >= 6 and data[start] == 0x81:
        size, at = data[start + 1] - 0x80, start + 2
        if size == 126:
            size = int.from_bytes(data[at : at + 2], "big")
            at += 2
            if size < 126:
                break
        elif size < 0 or size == 127:
            break
        stop = at + 4 + size
        if stop > end or size > max_message:
            break
        payload = data[at + 4 : stop]
        key = data[at : at + 4]
        if key != _NO_KEY:
            keys = (key * (size // 4 + 1))[:size]
            masked = int.from_bytes(payload, "little") ^ int.from_bytes(keys, "little")
            payload = masked.to_bytes(size, "little")
        try:
            events.append(Text(payload.decode()))
        except UnicodeDecodeError:
            break
        start = stop
    return start


_NO_KEY = bytes(4)
_NO_RSV = RsvBits(False, False, False)
_RSV1 = RsvBits(True, False, False)


class _Intake(Extension):
    """Limits and permessage-deflate, at the places where wsproto asks its extensions.

    Not wsproto's ``PerMessageDeflate``: that one inflates without bound, and a control frame between the
    fragments makes it forget that the message is compressed.
    """

    name = "permessage-deflate"

    def __init__(self, deflate: bool, max_message: int) -> None:
        self.problem: str | None = None  # better words than wsproto has for an extension's error
        self._deflate = deflate
        self._max_message = max_message
        # A compressed frame may be longer than what it holds: by 5 bytes a block in deflate's own worst case,
        # by an eighth with zlib's smallest settings.
        self._max_deflated = max_message + max_message // 8 + 1024
        self._size = 0  # bytes of the message so far, inflated
        self._within_message = False
        self._control = False
        self._compressed = False
        self._inflate: zlib._Decompress | None = None
        self._decoder: FrameDecoder | None = None  # ours, known from its first call on

    def at_rest(self) -> bool:
        """Whether all that was received has been given out."""
        decoder = self._decoder
        if decoder is None or self._within_message or decoder.header is not None or len(decoder.buffer):
            return False
        self._decoder = None  # it knows us, too: no need to leave a cycle
        return True

    def enabled(self) -> bool:
        return True

    def offer(self) -> bool | str:  # abstract in Extension; only clients ask
        return False

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> RsvBits | CloseReason:
        """As soon as the length is known. Called again if the mask was not there yet: so it counts nothing."""
        assert isinstance(proto, FrameDecoder)
        self._decoder = proto
        self._control = opcode.iscontrol()
        if self._control:
            return _NO_RSV
        if self._within_message != (opcode is Opcode.CONTINUATION):
            return self._fail(
                CloseReason.PROTOCOL_ERROR,
                "a new message inside another" if self._within_message else "a continuation of nothing",
            )
        if not self._within_message:
            self._compressed = rsv.rsv1 and self._deflate
        if payload_length > (self._max_deflated if self._compressed else self._max_message - self._size):
            return self._too_big()
        # Only the first frame of a message says that it is compressed (RFC 7692 section 6.1).
        return _RSV1 if self._compressed and not self._within_message else _NO_RSV

    def frame_inbound_payload_data(self, proto: FrameDecoder | FrameProtocol, data: bytes) -> bytes | CloseReason:
        if self._control:
            return data
        self._within_message = True
        if self._compressed:
            return self._inflated(data)
        self._size += len(data)
        return data

    def frame_inbound_complete(self, proto: FrameDecoder | FrameProtocol, fin: bool) -> bytes | CloseReason | None:
        if self._control or not fin:
            return None
        last = None
        if self._compressed and not (self._inflate is not None and self._inflate.eof):
            last = self._inflated(b"\x00\x00\xff\xff")  # RFC 7692 section 7.2.2
        self._inflate = None
        self._compressed = self._within_message = False
        self._size = 0
        return last

    def _inflated(self, data: bytes) -> bytes | CloseReason:
        """Decompress to at most one byte more than is allowed, so that a bomb never gets to unfold."""
        if self._inflate is None:
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        allowed = self._max_message - self._size
        try:
            inflated = self._inflate.decompress(data, allowed + 1)
        except zlib.error as error:
            return self._fail(CloseReason.INVALID_FRAME_PAYLOAD_DATA, str(error))
        if len(inflated) > allowed:
            return self._too_big()
        # A final block ends the message, but for the byte that completes the empty block at the end of it
        # (RFC 7692 section 7.2.3.4). zlib would pass over the rest in silence: half a message without an error.
        if self._inflate.unused_data not in (b"", b"\x00"):
            return self._fail(CloseReason.INVALID_FRAME_PAYLOAD_DATA, "data after the final deflate block")
        self._size += len(inflated)
        return inflated

    def _too_big(self) -> CloseReason:
        return self._fail(CloseReason.MESSAGE_TOO_BIG, f"a message of more than {self._max_message} bytes")

    def _fail(self, code: CloseReason, problem: str) -> CloseReason:
        self.problem = problem
        return code
