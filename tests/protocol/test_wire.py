"""What goes on the wire equals what general encoders make of the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import TextMessage
from wsproto.extensions import PerMessageDeflate

from protocol.frames import SMALL_WINDOW_BITS, deflated_text_frame
from protocol.http1 import encode_chunk
from protocol.sse import EventParser, encode_event
from protocol.update import Update
from protocol.wire import DEFLATE_FROM_BYTES, Framing, select_fields, update_message, wire_form

SIZES = [0, 1, 60, 80, 100, 125, 126, 1000, DEFLATE_FROM_BYTES, 65_535, 65_536, 100_000]


def record(size: int = 0, **more: Any) -> dict[str, Any]:
    return {"jobId": "a", "userId": "u", "status": "queued", "progress": 1.5, "message": "ü" + "x" * size, **more}


def update(offset: int = 1, size: int = 0, type_: str = "status_update", **more: Any) -> Update:
    body = json.dumps(record(size, **more), separators=(",", ":"), ensure_ascii=False).encode()
    return Update(offset, 0, type_, "a", "u", None, "queued", offset, body, False, False)


def expected(one: Update, cursor: str) -> dict[str, Any]:
    return {"type": one.type, "id": cursor} | json.loads(one.body)


def websocket_texts(data: bytes, *, deflate: bool) -> list[str]:
    """Read by wsproto's client."""
    extensions = []
    if deflate:
        extension = PerMessageDeflate()
        extension.finalize("permessage-deflate; server_no_context_takeover; client_no_context_takeover")
        extensions.append(extension)
    client = Connection(ConnectionType.CLIENT, extensions)  # type: ignore[arg-type]
    client.receive_data(data)
    texts, text = [], ""
    for event in client.events():
        assert isinstance(event, TextMessage)
        text += event.data
        if event.message_finished:
            texts.append(text)
            text = ""
    assert not text
    return texts


@pytest.mark.parametrize("type_", ["status_update", "job_completed", "job_failed", "job_cancelled", "job_deleted"])
def test_an_update_message_is_its_record_with_type_and_id(type_: str) -> None:
    one = update(7, type_=type_)
    text = update_message(one, "e:7")
    assert json.loads(text) == expected(one, "e:7")
    assert list(json.loads(text))[:2] == ["type", "id"]
    assert text == json.dumps(expected(one, "e:7"), separators=(",", ":"), ensure_ascii=False).encode()


def test_selected_fields_keep_their_text_and_order() -> None:
    body = b'{"jobId":"a","status":"queued","progress":1.50,"version":3,"metadata":{"b":1,"a":[ 1e5 ]},"x":0}'
    assert select_fields(body, frozenset({"metadata", "progress"})) == (
        b'{"jobId":"a","status":"queued","progress":1.50,"version":3,"metadata":{"b":1,"a":[ 1e5 ]}}'
    )
    assert select_fields(body, frozenset()) == b'{"jobId":"a","status":"queued","version":3}'
    assert select_fields(b'{"jobId":"a","userId":"u"}', frozenset({"progress"})) == b'{"jobId":"a"}'


@pytest.mark.parametrize("size", SIZES)
def test_websocket_frames_equal_wsprotos(size: int) -> None:
    batch = [update(1, size), update(2, size)]
    server = Connection(ConnectionType.SERVER)
    generic = b"".join(server.send(TextMessage(update_message(one, f"e:{one.offset}").decode())) for one in batch)
    assert wire_form(Framing.WEBSOCKET).updates(batch, "e") == generic
    assert (
        wire_form(Framing.WEBSOCKET).update(batch[0], "e:1") + wire_form(Framing.WEBSOCKET).update(batch[1], "e:2")
        == generic
    )


@pytest.mark.parametrize("size", SIZES)
def test_deflated_frames_are_read_by_wsproto_and_small_ones_are_not_deflated(size: int) -> None:
    form = wire_form(Framing.WEBSOCKET_DEFLATE)
    batch = [update(1, size), update(2, 0), update(3, size)]
    data = form.updates(batch, "e")
    texts = websocket_texts(data, deflate=True)
    assert [json.loads(text) for text in texts] == [expected(one, f"e:{one.offset}") for one in batch]
    message = update_message(batch[0], "e:1")
    assert (data[0] == 0xC1) is (len(message) >= DEFLATE_FROM_BYTES)
    if size > 10_000:
        assert len(data) < size


def test_the_line_between_plain_and_deflated() -> None:
    form = wire_form(Framing.WEBSOCKET_DEFLATE)
    assert form.message(b"x" * (DEFLATE_FROM_BYTES - 1))[0] == 0x81
    assert form.message(b"x" * DEFLATE_FROM_BYTES)[0] == 0xC1


def test_a_small_window_is_kept_to_in_every_way() -> None:
    batch = [update(1, 5_000)]
    for framing in (Framing.WEBSOCKET_DEFLATE_SMALL, Framing.WEBSOCKET_LINES_DEFLATE_SMALL):
        form = wire_form(framing)
        message = update_message(batch[0], "e:1")
        for frame in (form.updates(batch, "e"), form.update(batch[0], "e:1"), form.message(message)):
            assert frame == deflated_text_frame(message, SMALL_WINDOW_BITS)


@pytest.mark.parametrize("size", SIZES)
def test_event_streams_equal_the_general_encoder(size: int) -> None:
    batch = [update(1, size), update(2, 5)]
    generic = b"".join(encode_event(update_message(one, f"e:{one.offset}"), id=f"e:{one.offset}") for one in batch)
    assert wire_form(Framing.SSE).updates(batch, "e") == generic
    assert wire_form(Framing.SSE_CHUNKED).updates(batch, "e") == encode_chunk(generic)
    assert wire_form(Framing.SSE_CHUNKED).update(batch[0], "e:9") == encode_chunk(
        encode_event(update_message(batch[0], "e:9"), id="e:9")
    )
    events = EventParser().feed(generic)
    assert [json.loads(event.data) for event in events] == [expected(one, f"e:{one.offset}") for one in batch]


@pytest.mark.parametrize(("cursor", "retry_ms"), [(None, None), ("e:1", None), (None, 0), ("e:1", 3000)])
def test_messages_of_our_own_on_event_streams(cursor: str | None, retry_ms: int | None) -> None:
    generic = encode_event(b'{"type":"x"}', id=cursor, retry_ms=retry_ms)
    assert wire_form(Framing.SSE).message(b'{"type":"x"}', cursor, retry_ms) == generic
    assert wire_form(Framing.SSE_CHUNKED).message(b'{"type":"x"}', cursor, retry_ms) == encode_chunk(generic)
    # What only event streams show is left out elsewhere.
    assert wire_form(Framing.JSON).message(b'{"type":"x"}', cursor, retry_ms) == b'{"type":"x"}'
    assert websocket_texts(wire_form(Framing.WEBSOCKET).message(b'{"type":"x"}', cursor, retry_ms), deflate=False) == [
        '{"type":"x"}'
    ]


def test_bare_messages_are_joined_as_json_has_it() -> None:
    batch = [update(1), update(2)]
    text = b"[" + wire_form(Framing.JSON).updates(batch, "e") + b"]"
    assert json.loads(text) == [expected(one, f"e:{one.offset}") for one in batch]


def test_forms_are_one_object_per_framing_and_fields() -> None:
    assert wire_form(Framing.SSE) is wire_form(Framing.SSE)
    assert wire_form(Framing.SSE, frozenset({"a", "b"})) is wire_form(Framing.SSE, frozenset({"b", "a"}))
    assert wire_form(Framing.SSE, frozenset({"a"})) is not wire_form(Framing.SSE)
    assert wire_form(Framing.SSE) is not wire_form(Framing.WEBSOCKET)


@given(st.sampled_from(list(Framing)), st.lists(st.text(max_size=200), min_size=1, max_size=5))
def test_whatever_the_text_every_form_carries_it(framing: Framing, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    batch = [update(offset, message=text) for offset, text in enumerate(texts, 1)]
    data = wire_form(framing, frozenset({"message"})).updates(batch, "e")
    if framing is Framing.JSON:
        found = json.loads(b"[" + data + b"]")
    elif framing in (Framing.SSE, Framing.SSE_CHUNKED):
        if framing is Framing.SSE_CHUNKED:
            size, _, rest = data.partition(b"\r\n")
            assert len(rest) == int(size, 16) + 2
            data = rest[:-2]
        found = [json.loads(event.data) for event in EventParser().feed(data)]
    else:
        frames = websocket_texts(data, deflate="deflate" in framing.value)
        lines = [line for text in frames for line in text.split("\n")]
        assert len(frames) == 1 if "lines" in framing.value else frames == lines
        found = [json.loads(line) for line in lines]
    assert [message["message"] for message in found] == texts
    assert all(set(message) == {"type", "id", "jobId", "status", "message"} for message in found)
