"""One update as bytes on each transport, encoded at most once per wire form.

A ``WireForm`` is what two readers must share to be sent the same bytes: the framing, the record fields asked for, and
the view, with the kind of job that it shows. The hub keeps one encoding per form and flush, so the cost of a reader is
one ``send``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import lru_cache, partial
from typing import Final

import msgspec

from protocol.frames import SMALL_WINDOW_BITS, WINDOW_BITS, deflated_text_frame, text_frame
from protocol.http1 import encode_chunk
from protocol.job import Record
from protocol.notice import event_data
from protocol.sse import encode_event, encode_message, encode_update
from protocol.update import Update
from protocol.view import Message, View
from protocol.views.jobs import VIEW as JOBS

# Below this a compressed frame saves less than one packet and costs some 15 µs; above it a record has text
# or results worth compressing. One Ethernet segment less headers is the natural line.
DEFLATE_FROM_BYTES = 1200

_ALWAYS = ("jobId", "status", "version")
_RECORD = [field.encode_name for field in msgspec.structs.fields(Record)]
_ABSENT = msgspec.Raw(b"")
_encode = msgspec.json.Encoder().encode


class Framing(Enum):
    """How a message is put on the wire."""

    __hash__ = object.__hash__  # that of ``Enum`` is a call in Python, for the same

    JSON = "json"  # bare message text: poll bodies, history
    WEBSOCKET = "websocket"  # RFC 6455 text frame
    WEBSOCKET_DEFLATE = "websocket-deflate"  # the same, compressed without context takeover (RFC 7692)
    WEBSOCKET_DEFLATE_SMALL = "websocket-deflate-small"  # for peers that asked for a small window
    # What is sent together in one frame, a message a line: a browser takes 200 messages for the price of one.
    WEBSOCKET_LINES = "websocket-lines"
    WEBSOCKET_LINES_DEFLATE = "websocket-lines-deflate"
    WEBSOCKET_LINES_DEFLATE_SMALL = "websocket-lines-deflate-small"
    SSE = "sse"  # event stream, delimited by the end of the connection
    SSE_CHUNKED = "sse-chunked"  # event stream in HTTP/1.1 chunks


_LINES = frozenset({Framing.WEBSOCKET_LINES, Framing.WEBSOCKET_LINES_DEFLATE, Framing.WEBSOCKET_LINES_DEFLATE_SMALL})


class WireForm:
    """Framing, field selection and view. Compare by identity: ``wire_form`` interns them.

    Attributes:
        framing: how messages are framed.
        fields: record fields to send besides jobId, status and version; None for all. Only for views that send records.
        view: the words.
        kind: jobs of other kinds do not exist in it: their updates come to nothing. "" for none such.
    """

    __slots__ = ("_chunked", "_frame", "_lines", "fields", "framing", "kind", "view")

    def __init__(self, framing: Framing, fields: frozenset[str] | None, view: View = JOBS, kind: str = "") -> None:
        self.framing = framing
        self.fields = fields
        self.view = view
        self.kind = kind
        self._lines = framing in _LINES
        self._frame = _FRAMES.get(framing)  # None for event streams: an event has its cursor beside the message
        self._chunked = framing is Framing.SSE_CHUNKED

    def updates(self, updates: Sequence[Update], epoch: str) -> bytes:
        """Frame several updates, each with its own position, to be sent in one go."""
        if len(updates) == 1:  # what most flushes are to most channels
            (update,) = updates
            return self.update(update, f"{epoch}:{update.offset}")
        cursors = [f"{epoch}:{update.offset}" for update in updates]
        if self.view.render is not None:
            framed = [
                framed
                for update, cursor in zip(updates, cursors, strict=True)
                for framed in self._rendered(update, cursor)
            ]
            return self._joined(framed)
        fields = self.fields
        messages = [update_message(update, at, fields) for update, at in zip(updates, cursors, strict=True)]
        if self._lines:
            return text_frame(b"\n".join(messages))
        return self._joined(map(self._frame, messages) if self._frame else map(_event, updates, cursors, messages))

    def update(self, update: Update, cursor: str) -> bytes:
        """Frame one update under any cursor: with held-back delivery it is not the update's own position."""
        if self.view.render is not None:
            return self._joined(self._rendered(update, cursor))
        message = update_message(update, cursor, self.fields)
        if self._frame is not None:
            return self._frame(message)
        event = _event(update, cursor, message)
        return encode_chunk(event) if self._chunked else event

    def message(
        self, message: bytes, cursor: str | None = None, retry_ms: int | None = None, event: str | None = None
    ) -> bytes:
        """Frame any one message (JSON text). ``cursor``, ``retry_ms`` and ``event`` only show on event streams."""
        if self._frame is not None:
            return self._frame(message)
        if event is None:
            text = encode_message(message, cursor, retry_ms)
        else:
            text = encode_event(message, id=cursor, event=event, retry_ms=retry_ms)
        return encode_chunk(text) if self._chunked else text

    def _rendered(self, update: Update, cursor: str) -> list[bytes]:
        """The view's messages for one update, framed but not put into chunks."""
        render = self.view.render
        if render is None or (self.kind and update.kind != self.kind):
            return []
        *before, last = render(update)
        framed = []
        if before:
            # Whoever got only these must get all of them again.
            epoch, _, offset = cursor.rpartition(":")
            behind = f"{epoch}:{min(int(offset), update.offset - 1)}"
            framed = [self._unchunked(message, behind) for message in before]
        framed.append(self._unchunked(last, cursor))
        return framed

    def _unchunked(self, message: Message, cursor: str) -> bytes:
        if self._frame is not None:
            return self._frame(message.text)
        if message.event is None:
            return encode_update(cursor.encode(), message.text)
        return encode_event(message.text, id=cursor, event=message.event)

    def _joined(self, framed: Iterable[bytes]) -> bytes:
        joined = (b"," if self.framing is Framing.JSON else b"").join(framed)
        return encode_chunk(joined) if self._chunked else joined


@lru_cache(maxsize=4096)
def wire_form(framing: Framing, fields: frozenset[str] | None = None, view: View = JOBS, kind: str = "") -> WireForm:
    """The one ``WireForm`` of these four, so that forms compare by identity.

    The cache is bounded: should more than 4,096 be in use, some are merely encoded twice.
    """
    return WireForm(framing, fields, view, kind)


def update_message(update: Update, cursor: str, fields: frozenset[str] | None = None) -> bytes:
    """``{"type":…,"id":<cursor>,…record}`` as JSON text; the record's own text is reused as it is."""
    body = update.body if fields is None or update.targets is not None else select_fields(update.body, fields)
    return b'{"type":"%b","id":"%b",%b' % (update.type.encode(), cursor.encode(), body[1:])


def _event(update: Update, cursor: str, message: bytes) -> bytes:
    """One event of a stream: a job's is unnamed, a notification's has its name."""
    if update.targets is None:
        return encode_update(cursor.encode(), message)
    return encode_event(event_data(update), id=cursor, event=update.kind)


def select_fields(body: bytes, fields: frozenset[str]) -> bytes:
    """Cut a record's JSON text down to the asked fields plus jobId, status and version, in record order."""
    return _encode(_cut(fields)(body))


@lru_cache(maxsize=256)
def _cut(fields: frozenset[str]) -> Callable[[bytes], msgspec.Struct]:
    """What reads these fields of a record, and no others: five times as fast as reading all and choosing.

    A type of its own each, made in 40 µs and of 3 KB; so they are kept, if not for ever.
    """
    names = [name for name in _RECORD if name in fields or name in _ALWAYS]
    members = [(name, msgspec.Raw, _ABSENT) for name in names]
    return msgspec.json.Decoder(msgspec.defstruct("Cut", members, omit_defaults=True, gc=False)).decode


def json_list(parts: Iterable[bytes], before: bytes, after: bytes, piece_bytes: int = 65536) -> Iterable[bytes]:
    """Stream ``before[a,b,c]after`` in pieces of about ``piece_bytes``, never holding the whole text."""
    pending = [before, b"["]
    size = len(before)
    first = True
    for part in parts:
        if not first:
            pending.append(b",")
        first = False
        pending.append(part)
        size += len(part)
        if size >= piece_bytes:
            yield b"".join(pending)
            pending, size = [], 0
    pending.append(b"]")
    pending.append(after)
    yield b"".join(pending)


def _bare(message: bytes) -> bytes:
    return message


def _deflated(message: bytes, *, window_bits: int) -> bytes:
    return deflated_text_frame(message, window_bits) if len(message) >= DEFLATE_FROM_BYTES else text_frame(message)


_FRAMES: Final[dict[Framing, Callable[[bytes], bytes]]] = {
    Framing.JSON: _bare,
    Framing.WEBSOCKET: text_frame,
    Framing.WEBSOCKET_DEFLATE: partial(_deflated, window_bits=WINDOW_BITS),
    Framing.WEBSOCKET_DEFLATE_SMALL: partial(_deflated, window_bits=SMALL_WINDOW_BITS),
    Framing.WEBSOCKET_LINES: text_frame,
    Framing.WEBSOCKET_LINES_DEFLATE: partial(_deflated, window_bits=WINDOW_BITS),
    Framing.WEBSOCKET_LINES_DEFLATE_SMALL: partial(_deflated, window_bits=SMALL_WINDOW_BITS),
}
