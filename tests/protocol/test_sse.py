"""Event streams against WHATWG HTML section 9.2: by table, by property, and both directions coupled."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.sse import Event, EventParser, EventTooLarge, encode_event, encode_update

LINE_END = re.compile("\r\n|\r|\n")


def parse(*chunks: bytes) -> list[Event]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def reference(stream: bytes) -> list[Event]:
    """Section 9.2.6 word by word, over the whole text at once."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _unfinished = LINE_END.split(text)
    events: list[Event] = []
    data, event_type, last_id, retry = "", "", "", None
    for line in lines:
        if line == "":
            if data != "":
                events.append(Event(data.removesuffix("\n"), last_id, event_type or "message", retry))
            data, event_type, retry = "", "", None
        elif line.startswith(":"):
            pass
        else:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                event_type = value
            elif field == "data":
                data += value + "\n"
            elif field == "id" and "\0" not in value:
                last_id = value
            elif field == "retry" and re.fullmatch("[0-9]+", value):
                retry = int(value)
    return events


# --- encoding


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (encode_event(b"hi"), b"data: hi\n\n"),
        (encode_event(b""), b"data: \n\n"),
        (encode_event(b" x"), b"data:  x\n\n"),
        (encode_event(b"a", id="e:1"), b"id: e:1\ndata: a\n\n"),
        (encode_event(b"a", id=""), b"id: \ndata: a\n\n"),
        (encode_event(b"a", id="1", event="job", retry_ms=1500), b"retry: 1500\nid: 1\nevent: job\ndata: a\n\n"),
        (encode_event(b"a\nb\r\nc\rd"), b"data: a\ndata: b\ndata: c\ndata: d\n\n"),
        (encode_event(b"a\n"), b"data: a\ndata: \n\n"),
        (encode_event(b"a\r\r\n\nb"), b"data: a\ndata: \ndata: \ndata: b\n\n"),
        (encode_event("é\u2028".encode()), "data: é\u2028\n\n".encode()),
        (encode_event(b"a\x0b\x0c\x1cb"), b"data: a\x0b\x0c\x1cb\n\n"),
        (encode_event(b"a", retry_ms=0), b"retry: 0\ndata: a\n\n"),
    ],
)
def test_encoded(event: bytes, expected: bytes) -> None:
    assert event == expected


@pytest.mark.parametrize("bad", ["a\0b", "a\rb", "a\nb", "\n"])
def test_ids_that_would_break_the_stream(bad: str) -> None:
    with pytest.raises(ValueError, match="must not contain NUL, CR or LF"):
        encode_event(b"", id=bad)


@pytest.mark.parametrize("bad", ["", "a\rb", "a\nb"])
def test_event_names_that_would_break_the_stream(bad: str) -> None:
    with pytest.raises(ValueError, match="event="):
        encode_event(b"", event=bad)


def test_a_negative_delay_is_refused() -> None:
    with pytest.raises(ValueError, match="retry_ms=-1"):
        encode_event(b"", retry_ms=-1)


@given(st.from_regex(r"[A-Za-z0-9:]{1,20}", fullmatch=True), st.from_regex(r"[^\r\n]{0,50}", fullmatch=True))
def test_the_short_way_gives_the_same_bytes(cursor: str, data: str) -> None:
    assert encode_update(cursor.encode(), data.encode()) == encode_event(data.encode(), id=cursor)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=20)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n"), max_size=30),
            st.none() | words,
            st.none() | words.filter(bool),
            st.none() | st.integers(0, 10**9),
        ),
        max_size=5,
    )
)
def test_what_is_encoded_is_parsed(events: list[tuple[str, str | None, str | None, int | None]]) -> None:
    stream = b"".join(
        encode_event(data.encode(), id=id, event=event, retry_ms=retry) for data, id, event, retry in events
    )
    assert b"\r" not in stream
    last_id, expected = "", []
    for data, id, event, retry in events:
        last_id = last_id if id is None else id
        expected.append(Event("\n".join(LINE_END.split(data)), last_id, event or "message", retry))
    assert parse(stream) == expected


# --- parsing


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # The examples of section 9.2.6.
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event("YHOO\n+2\n10")]),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
            [Event("first event", "1"), Event("second event", "")],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [Event(""), Event("\n")]),
        (b"data:test\n\ndata: test\n\n", [Event("test"), Event("test")]),
        # Line ends.
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\n", [Event("a"), Event("b"), Event("c")]),
        (b"data: a\r\ndata: b\r\n\n", [Event("a\nb")]),
        (b"data: a\x0bb\x0cc\x1dd\xc2\x85e\xe2\x80\xa8f\n\n", [Event("a\x0bb\x0cc\x1dd\x85e\u2028f")]),
        # Byte order mark: one, and only at the start.
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [Event("a")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
        (b"\xef\xbb\xbf\ndata: a\n\n", [Event("a")]),
        # Fields.
        (b"event: x\ndata: a\n\ndata: b\n\n", [Event("a", event="x"), Event("b")]),
        (b"event: x\n\ndata: b\n\n", [Event("b")]),
        (b"event: x\nevent:\ndata: b\n\n", [Event("b")]),
        (b"id: 1\n\ndata: b\n\n", [Event("b", "1")]),
        (b"id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n", [Event("a", "1"), Event("b", "1")]),
        (b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n", [Event("a", "1"), Event("b", "1"), Event("c")]),
        (b"Data: a\n data: b\ndata : c\nother: d\n\n", []),
        (b"data: a:b: c\n\n", [Event("a:b: c")]),
        (b":data: a\n:\n\n", []),
        (b"retry: 10\ndata: a\n\ndata: b\n\n", [Event("a", retry=10), Event("b")]),
        (b"retry: 010\ndata: a\n\n", [Event("a", retry=10)]),
        (b"retry: 1.5\nretry: -1\nretry:\nretry: 5s\nretry:  5\ndata: a\n\n", [Event("a")]),
        (b"retry: \xd9\xa3\nretry: \xc2\xb2\ndata: a\n\n", [Event("a")]),
        (b"retry: " + b"9" * 5000 + b"\ndata: a\n\n", [Event("a")]),
        # Broken UTF-8 is replaced and never runs over the end of a line.
        (b"data: \xff\xe2\x82\ndata: \xe2\x82\xac\n\n", [Event("\ufffd\ufffd\n€")]),
        # An event that is not finished does not exist.
        (b"data: a\n\ndata: b\n", [Event("a")]),
        (b"data: a\n\ndata: b", [Event("a")]),
        (b"", []),
    ],
)
def test_parsed(stream: bytes, expected: list[Event]) -> None:
    assert parse(stream) == expected
    assert parse(*(bytes((byte,)) for byte in stream)) == expected
    assert parse(b"", stream, b"") == expected


def test_cr_at_the_end_of_a_chunk_ends_the_line_at_once() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\r\n\r") == [Event("a")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\ndata: b\n\n") == [Event("b")]


def test_the_delay_holds_from_its_line_on() -> None:
    parser = EventParser()
    parser.feed(b"data: a\n\n")
    assert [parser.retry_ms] == [None]
    parser.feed(b"retry: 2500\n")
    assert parser.retry_ms == 2500
    assert parser.feed(b"\ndata: a\n\n") == [Event("a")]
    assert parser.retry_ms == 2500


def test_the_last_event_id_holds_from_the_end_of_its_event_on() -> None:
    parser = EventParser(last_event_id="e:7")
    assert parser.last_event_id == "e:7"
    assert parser.feed(b"data: a\n\n") == [Event("a", "e:7")]
    parser.feed(b"id: e:9\ndata: b\n")
    assert parser.last_event_id == "e:7"  # the connection may be lost before the blank line
    parser.feed(b"\n")
    assert parser.last_event_id == "e:9"
    parser.feed(b"id: e:10\n\n")
    assert parser.last_event_id == "e:10"  # without data there is no event, but the id counts


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 200,
        b"data: " + b"x" * 200 + b"\n\n",
        b": " + b"x" * 200 + b"\n",
        b"data: x\n" * 20,
        b"data\n" * 40,
    ],
)
def test_events_have_a_bound(stream: bytes) -> None:
    with pytest.raises(EventTooLarge, match="more than 100 bytes"):
        EventParser(max_event=100).feed(stream)
    parser = EventParser(max_event=100)
    with pytest.raises(EventTooLarge):
        [parser.feed(bytes((byte,))) for byte in stream]


def test_the_bound_is_for_one_event() -> None:
    parser = EventParser(max_event=100)
    assert len(parser.feed((b"data: " + b"x" * 90 + b"\n\n") * 50)) == 50
    assert len(parser.feed(b"data: " + b"x" * 40 + b"\ndata: " + b"y" * 40 + b"\n\n")) == 1


pieces = st.sampled_from(
    [b"data", b"data:", b"data: x", b"id: 1", b"id: a\0", b"id", b"event: e", b"event", b"retry: 12", b"retry: x",
     b":", b": c", b" ", b"\xef\xbb\xbf", b"\xe2\x82", b"\xac", b"\r", b"\n", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n"]
)  # fmt: skip


@given(st.lists(pieces | st.binary(max_size=4), max_size=40).map(b"".join), st.data())
def test_any_split_gives_the_events_of_the_specification(stream: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*chunks) == parse(stream) == reference(stream)
