"""What is fuzzed: each target takes any bytes, and an exception out of it is a finding.

That nothing crashes is the least: any split of the bytes must say the same, only documented errors may come, what is
let in must be fit for what comes behind it, and what comes out is bounded by what went in.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import msgspec
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, TextMessage
from wsproto.extensions import PerMessageDeflate

from protocol import http1, messages
from protocol.errors import ApiError, CloseCode
from protocol.fields import Fields, decode_fields
from protocol.frames import close_frame, deflated_text_frame, ping_frame, text_frame
from protocol.job import apply
from protocol.job import create as create_job
from protocol.position import Position, Since, parse_cursor
from protocol.queues import bull4, bullmq, celery, rq
from protocol.queues.payload import MAX_READ, unpacked
from protocol.queues.pickles import PickleRefusedError, read_pickle
from protocol.queues.sighting import Known, Sighting, settle
from protocol.request import Request, parse_query, parse_target
from protocol.resp import ProtocolError, RedisError, Replies
from protocol.signatures import check_signature, sign
from protocol.sse import Event, EventParser, EventTooLarge, encode_event
from protocol.update import Job, Update
from protocol.view import Message, in_words, read_update, target_of
from protocol.views import all_views
from protocol.websocket import Binary, DeflateParameters, Text, WebSocketError, WebSocketReader, accept_handshake
from server.config import ConfigError
from server.config_load import describe, load_with_sources
from server.limits import client_address, parse_proxies
from tests.fuzz.conversation import conversation
from tests.fuzz.server_targets import exports, keys, notices, origins, parameters, proxy, spooled, tokens

LIMIT: Final = 5000
NOW_MS: Final = 1_700_000_000_000


def pieces(data: bytes) -> Iterator[list[bytes]]:
    """Some ways to cut the bytes: whole, one by one while they are few, and at places that follow from them."""
    yield [data]
    if len(data) <= 400:
        yield [data[at : at + 1] for at in range(len(data))]
    places = random.Random(data)
    cuts = sorted(places.randrange(len(data) + 1) for _ in range(5))
    yield [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


def same(stories: Sequence[object]) -> None:
    """All ways to cut must come to the same."""
    for story in stories[1:]:
        assert story == stories[0], stories


# HTTP


def http(data: bytes) -> None:
    """Requests, heads and bodies."""
    same([_requests(way) for way in pieces(data)])


def _requests(way: list[bytes]) -> list[object]:
    connection, story, body = http1.HttpConnection(), [], bytearray()
    try:
        for piece in [*way, b""]:
            connection.receive(piece)
            while True:
                event = connection.next_event()
                if isinstance(event, Request):
                    story.append((event.method, event.target, event.path, event.http_version, dict(event.headers)))
                    _read(event)
                    connection.limit_body(LIMIT)
                elif isinstance(event, http1.BodyData):
                    body += event.data
                    assert len(body) <= LIMIT
                elif isinstance(event, http1.EndOfBody):
                    story.append(bytes(body))
                    body.clear()
                    connection.respond(200, [("X", "y")], b"ok")
                    if not connection.next_request():
                        return story
                else:
                    break
    except ApiError as error:
        story.append((error.status, error.code))
        answer = connection.respond(error.status, [], b"no", close=True)
        assert b"Connection: close\r\n" in answer
    return story


def _read(request: Request) -> None:
    assert not re.search("[\x00-\x1f\x7f]", request.path)
    for value in request.headers.values():
        assert not re.search("[\x00\r\n]", value), value
    assert isinstance(request.cookies, dict)
    assert request.content_type == request.content_type.lower()
    assert request.accepts_event_stream in (True, False)
    client_address("10.0.0.1", request, parse_proxies(["10.0.0.0/8"]))
    try:
        assert all(isinstance(value, str) for value in request.query.values())
    except ApiError as error:
        assert error.status == 400
    try:
        handshake = accept_handshake(request, protocols=("statuswire.v1",), echo_prefix="bearer.", deflate=True)
    except ApiError as error:
        assert error.status in (400, 405, 426)
    else:
        assert all(not re.search("[\x00\r\n]", value) for _, value in handshake.headers)


def url(data: bytes) -> None:
    """Targets and queries."""
    method, _, target = data.decode("latin-1").partition(" ")
    if target and re.fullmatch("[\x21-\x7e]+", target):
        try:
            path, _ = parse_target(method, target)
        except ApiError as error:
            assert error.status in (400, 405)
        else:
            assert path == "*" or path.startswith("/"), path
    try:
        query = parse_query(target)
    except ApiError as error:
        assert error.code == "invalid_parameter"
    else:
        assert len(query) <= 100
        assert sum(len(name) + len(value) for name, value in query.items()) <= len(target)


# WebSocket


def websocket(data: bytes) -> None:
    """Frames of a client; the first byte says whether compression was agreed on, and how large messages may be."""
    flags, data = (data[0] if data else 0), data[1:]
    deflate = DeflateParameters() if flags & 1 else None
    limit = (16, 200, 5000, 70_000)[flags >> 1 & 3]
    same([_frames(way, deflate, limit) for way in pieces(data)])


def _frames(way: list[bytes], deflate: DeflateParameters | None, limit: int) -> list[object]:
    reader, story = WebSocketReader(deflate, limit), []
    for piece in way:
        try:
            events = reader.receive(piece)
            failure = None
        except WebSocketError as error:
            events, failure = error.events, error
        for event in events:
            if isinstance(event, Text):
                assert len(event.data.encode()) <= limit
                messages.ref_of(event.data)
            elif isinstance(event, Binary):
                assert len(event.data) <= limit
            story.append(event)
        assert reader.unfinished <= limit
        if failure is not None:
            close_frame(failure.code, failure.reason)
            # What zlib had unfolded before it met a mistake in the same bytes, it does not say: whether such a message
            # was too long first, or wrong first, depends on how it is cut.
            either = deflate is not None and failure.code in (CloseCode.INVALID_PAYLOAD, CloseCode.TOO_BIG)
            story.append("too long, or wrong" if either else int(failure.code))
            break
    return story


def frames(data: bytes) -> None:
    """What we send is what another implementation reads."""
    text = data.decode("utf-8", "replace")
    extension = PerMessageDeflate(server_no_context_takeover=True)
    extension._enabled = True
    for deflated, frame in ((False, text_frame(text.encode())), (True, deflated_text_frame(text.encode()))):
        peer = Connection(ConnectionType.CLIENT, [extension] if deflated else [])
        peer.receive_data(frame)
        assert "".join(event.data for event in peer.events() if isinstance(event, TextMessage)) == text
    peer = Connection(ConnectionType.CLIENT)
    peer.receive_data(close_frame(3000 + len(data) % 2000, text))
    (closed,) = peer.events()
    assert isinstance(closed, CloseConnection)
    assert text.startswith(closed.reason or "")
    if len(data) > 125:
        try:
            ping_frame(data)
        except ValueError:
            return
        raise AssertionError("a control frame has at most 125 bytes")


def client_messages(data: bytes) -> None:
    """Messages of WebSocket clients."""
    for decode in (messages.decode_client_message, messages.decode_notify_message, messages.decode_ack):
        try:
            message = cast(Callable[[bytes], Any], decode)(data)
        except ApiError as error:
            assert error.status in (400, 422)
            msgspec.json.decode(messages.error_message(error, messages.ref_of(data)))
            continue
        if isinstance(message, messages.Subscribe):
            for reading in (messages.subscribe_filter, messages.subscribe_fields, messages.min_interval_s):
                try:
                    reading(message)
                except ApiError as error:
                    assert error.status == 422


# Jobs


def updates(data: bytes) -> None:
    """One update: what is accepted can be encoded, and read again, and is the same."""
    try:
        fields = decode_fields(data)
    except ApiError as error:
        assert error.status in (400, 413, 422)
        msgspec.json.decode(messages.error_message(error))
        return
    again = decode_fields(msgspec.json.encode(fields))
    assert msgspec.json.encode(again) == msgspec.json.encode(fields)


def cursors(data: bytes) -> None:
    """What stands in ``last_seen``."""
    text = data.decode("latin-1")
    found = parse_cursor(text)
    if isinstance(found, Position):
        assert str(found) == text
    elif isinstance(found, Since):
        assert 0 <= found.unix_ms < 10**18


def signatures(data: bytes) -> None:
    """A signature that is made up is refused, one that is ours is not."""
    head, _, body = data.partition(b"\n")
    timestamp, _, signature = head.decode("latin-1").partition(" ")
    try:
        check_signature("a secret of the fuzzer", timestamp, signature, body, 1.7e9)
    except ApiError as error:
        assert error.status == 401
    else:
        assert signature.lower() == sign("a secret of the fuzzer", int(timestamp), body)
    good = sign("a secret of the fuzzer", 1_700_000_000, body)
    assert check_signature("a secret of the fuzzer", "1700000000", good, body, 1.7e9) == good[7:]


def views(data: bytes) -> None:
    """What is published in the words of each view; what comes of it can be shown in them, and put into a page."""
    flag, data = (data[0] if data else 0), data[1:]
    ways = [(view, call) for view in all_views().values() for call in view.calls if call.does not in _READING]
    view, call = ways[flag % len(ways)]
    target = target_of(view, {view.variable: "a", "app": "brand-monitor"})
    job: Job | None = None
    for number, body in enumerate(data.split(b"\n"), 1):
        try:
            fields = view.settle(job, read_update(view, target, call.sets, body))
            if job is None:
                job = create_job(fields, job_id=target.job_id, user_id="u", offset=number, now_ms=NOW_MS)
            else:
                job = apply(job, fields, offset=number, now_ms=NOW_MS + number)
        except ApiError as error:
            assert error.status in (400, 404, 409, 413, 422)
            msgspec.json.decode(messages.error_message(in_words(view, error)))
            continue
        shown = [view.state(job.latest), *(message.text for message in (view.render or _as_it_is)(job.latest))]
        for text in shown:
            msgspec.json.decode(text)
            assert view.render is None or b"<" not in text


_READING: Final = ("stream", "show", "head", "health")


def _as_it_is(update: Update) -> list[Message]:
    return [Message(update.body)]


# Event streams


def events(data: bytes) -> None:
    """An event stream that is read, however it is cut; and what we send is read as it was meant."""
    same([_events(way) for way in pieces(data)])
    text = data.decode("utf-8", "replace")
    (event,) = EventParser().feed(encode_event(text.encode(), id="7", event="e", retry_ms=1))
    assert event == Event(re.sub("\r\n|\r", "\n", text), "7", "e", 1)


def _events(way: list[bytes]) -> list[object]:
    parser, story = EventParser(max_event=LIMIT), []
    try:
        for piece in way:
            story += parser.feed(piece)
    except EventTooLarge:
        return ["too large"]  # events of the same bytes are lost with it
    return [*story, parser.last_event_id, parser.retry_ms]


# Redis and queues

_LARGE = re.compile(rb"[*%~>|$=!][0-9]{6,}")


def resp(data: bytes) -> None:
    """Replies of Redis, which is trusted not to announce more than it has."""
    if _LARGE.search(data):
        return
    same([_replies(way) for way in pieces(data)])


def _replies(way: list[bytes]) -> list[object]:
    replies, story = Replies(), []
    for piece in way:
        try:
            story += [repr(value) for value in replies.feed(piece)]
        except ProtocolError:
            # Replies that the same bytes have completed are lost with it, so how many there were depends on the cut.
            return ["broken"]
        for value in story:
            assert isinstance(value, str)
    return story


def redis_errors(data: bytes) -> None:
    """Errors of Redis."""
    error = RedisError(data.decode("utf-8", "replace"))
    assert re.fullmatch("[A-Z][A-Z0-9]*", error.code)
    assert error.refused in (True, False)
    error.redirection()


def pickles(data: bytes) -> None:
    """Pickles of RQ: a value that is about as large as what came in, or a refusal."""
    try:
        value = read_pickle(data)
    except PickleRefusedError:
        return
    assert _size(value) <= 16 * len(data) + MAX_READ, "it unfolds"


def _size(value: object) -> int:
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_size, value)) + len(value)
    return 8


def queues(data: bytes) -> None:
    """What job queues write: whatever it is, there is no update of it or one that can be published."""
    flag, data = (data[0] if data else 0), data[1:]
    text = data.decode("utf-8", "replace")
    lines = text.split("\n")
    pairs = dict(zip(lines[::2], lines[1::2], strict=False))
    raw = {name: value.encode() for name, value in pairs.items()}
    seen: list[Sighting | None] = []
    match flag % 6:
        case 0:
            told = celery.read_result(data, NOW_MS, results=True)
            seen = [None if told is None else told.seen]
        case 1:
            seen = [found.seen for found in celery.read_events(data, NOW_MS) if isinstance(found, celery.Told)]
        case 2:
            seen = [bull4.read_message("q", event, text, NOW_MS, results=True) for event in sorted(bull4.TAKEN)]
        case 3:
            seen = [bullmq.read_event("q", f"{NOW_MS}-0", pairs, results=True)]
        case 4:
            seen = [bullmq.read_hash("q", "7", pairs, "active", 1, results=True)]
        case 5:
            packed = unpacked(data)
            assert packed is None or len(packed) <= MAX_READ
            seen = [rq.read_job("7", raw | {"data": data, "meta": data}, None, NOW_MS, results=True)]
    known: Known | None = None
    for sighting in seen:
        if sighting is None:
            continue
        fields = settle(known, sighting, "queue")
        if fields is not None:
            assert isinstance(fields, Fields)
            assert fields.progress is msgspec.UNSET or math.isfinite(fields.progress)
            decode_fields(msgspec.json.encode(fields))


# Configuration


class _Text:
    """A file that is not on a disk."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_text(self, encoding: str) -> str:
        return self._data.decode(encoding)

    def __str__(self) -> str:
        return "statuswire.toml"


def config(data: bytes) -> None:
    """A file, and a variable of the environment: settings that can be shown, or a reason in words."""
    for environ, file in (({}, data), (_variable(data), b"")):
        try:
            found, sources = load_with_sources({}, environ, cast(Path, _Text(file)))
        except ConfigError as error:
            assert str(error)
        else:
            describe(found, sources)


def _variable(data: bytes) -> dict[str, str]:
    name, _, value = data.decode("utf-8", "replace").partition("=")
    return {f"STATUSWIRE_{name}": value}


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        http, url, websocket, frames, client_messages, updates, cursors, signatures, views, events, resp, redis_errors,
        pickles, queues, config, conversation, proxy, tokens, keys, origins, parameters, notices, exports, spooled,
    )
}  # fmt: skip
