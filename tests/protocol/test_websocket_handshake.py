"""The opening handshake of a WebSocket, by table and against wsproto's client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, RejectConnection, TextMessage
from wsproto.events import Request as WsprotoRequest
from wsproto.extensions import PerMessageDeflate

from protocol.errors import ApiError
from protocol.frames import SMALL_WINDOW_BITS, WINDOW_BITS, deflated_text_frame, text_frame
from protocol.request import Request
from protocol.websocket import Handshake, Text, WebSocketReader, accept_handshake
from tests.protocol.client_frames import MIB, PLAIN_ANSWER

GOOD = {
    "host": "localhost",
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    "sec-websocket-version": "13",
}


def shake(
    changes: dict[str, str | None] | None = None,
    *,
    method: str = "GET",
    http_version: str = "1.1",
    protocols: Sequence[str] = ("statuswire.v1",),
    echo_prefix: str | None = None,
    deflate: bool = True,
) -> Handshake:
    headers = {name: value for name, value in (GOOD | (changes or {})).items() if value is not None}
    request = Request(method, "/ws/jobs", "/ws/jobs", {}, headers, http_version)
    return accept_handshake(request, protocols=protocols, echo_prefix=echo_prefix, deflate=deflate)


def test_the_example_of_the_rfc() -> None:
    assert shake() == Handshake(
        headers=[
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        ],
        protocol=None,
        offered=(),
        deflate=None,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"upgrade": "WebSocket"},
        {"upgrade": "h2c, websocket"},
        {"connection": "keep-alive, Upgrade"},
        {"connection": "UPGRADE,keep-alive"},
        {"content-length": "0"},
        {"content-length": "00"},
    ],
)
def test_accepted(changes: dict[str, str | None]) -> None:
    assert shake(changes).headers[0] == ("Upgrade", "websocket")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"upgrade": None}, 426, "Upgrade: websocket"),
        ({"upgrade": "h2c"}, 426, "Upgrade: websocket"),
        ({"upgrade": "websocket2"}, 426, "Upgrade: websocket"),
        ({"connection": None}, 426, "Connection: Upgrade"),
        ({"connection": "keep-alive"}, 426, "Connection: Upgrade"),
        ({"sec-websocket-version": None}, 426, "must be 13, not None"),
        ({"sec-websocket-version": "8"}, 426, "must be 13, not '8'"),
        ({"sec-websocket-version": "013"}, 426, "must be 13"),
        ({"sec-websocket-version": "13, 13"}, 426, "must be 13"),
        ({"sec-websocket-version": "abc"}, 426, "must be 13"),
        ({"sec-websocket-key": None}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": ""}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "c2hvcnQ="}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZSE="}, 400, "Sec-WebSocket-Key"),  # 17 bytes
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ"}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25j*Q=="}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jé==="}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==, dGhlIHNhbXBsZSBub25jZQ=="}, 400, "Sec-WebSocket-Key"),
        ({"content-length": "1"}, 400, "no body"),
        ({"content-length": "10"}, 400, "no body"),
        ({"transfer-encoding": "chunked"}, 400, "no body"),
        ({"sec-websocket-protocol": ""}, 400, "list of tokens"),
        ({"sec-websocket-protocol": ",,"}, 400, "list of tokens"),
        ({"sec-websocket-protocol": "a b"}, 400, "list of tokens"),
        ({"sec-websocket-protocol": 'a, "b"'}, 400, "list of tokens"),
    ],
)
def test_refused(changes: dict[str, str | None], status: int, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        shake(changes)
    assert caught.value.status == status
    if status == 426:
        assert set(caught.value.headers) == {
            ("Sec-WebSocket-Version", "13"),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
        }
        assert caught.value.code in ("upgrade_required", "unsupported_version")
    else:
        assert caught.value.code == "bad_handshake"


@pytest.mark.parametrize("method", ["POST", "HEAD", "OPTIONS", "get"])
def test_only_get(method: str) -> None:
    with pytest.raises(ApiError) as caught:
        shake(method=method)
    assert (caught.value.status, caught.value.headers) == (405, (("Allow", "GET"),))


def test_only_http_1_1() -> None:
    with pytest.raises(ApiError, match=r"not HTTP/1\.0") as caught:
        shake(http_version="1.0")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("offer", "chosen"),
    [
        (None, None),
        ("statuswire.v1", "statuswire.v1"),
        ("other", None),
        ("bearer.a.b.c, statuswire.v1", "statuswire.v1"),
        ("statuswire.v1, statuswire.v2", "statuswire.v2"),  # our order decides
        ("other, bearer.a.b.c", "bearer.a.b.c"),
        ("bearer.a,bearer.b,,", "bearer.a"),
        ("STATUSWIRE.V1", None),
        ("statuswire.v1, statuswire.v1", "statuswire.v1"),
    ],
)
def test_subprotocols(offer: str | None, chosen: str | None) -> None:
    result = shake(
        {"sec-websocket-protocol": offer}, protocols=("statuswire.v2", "statuswire.v1"), echo_prefix="bearer."
    )
    assert result.protocol == chosen
    assert dict(result.headers).get("Sec-WebSocket-Protocol") == chosen
    assert set(result.offered) == {name.strip() for name in (offer or "").split(",")} - {""}


def test_nothing_is_echoed_unasked() -> None:
    result = shake({"sec-websocket-protocol": "bearer.a, bearer.b"})
    assert (result.protocol, result.offered) == (None, ("bearer.a", "bearer.b"))


LIMITED_ANSWER = f"{PLAIN_ANSWER}; server_max_window_bits={WINDOW_BITS}"
SMALL_ANSWER = f"{PLAIN_ANSWER}; server_max_window_bits={SMALL_WINDOW_BITS}"


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("permessage-deflate", PLAIN_ANSWER),
        ("Permessage-Deflate", PLAIN_ANSWER),
        ("permessage-deflate; client_max_window_bits", PLAIN_ANSWER),  # Chrome
        ("permessage-deflate; client_max_window_bits=15; server_max_window_bits=15", LIMITED_ANSWER),  # wsproto
        ("permessage-deflate; server_max_window_bits=12; client_max_window_bits=12", LIMITED_ANSWER),  # websockets
        ("permessage-deflate ;client_max_window_bits = 8 ; server_no_context_takeover", PLAIN_ANSWER),
        ('permessage-deflate; client_max_window_bits="10"', PLAIN_ANSWER),
        ('permessage-deflate; server_max_window_bits="13"', LIMITED_ANSWER),
        ("permessage-deflate; client_no_context_takeover; server_no_context_takeover", PLAIN_ANSWER),
        ("permessage-deflate; CLIENT_NO_CONTEXT_TAKEOVER", PLAIN_ANSWER),
        # The first acceptable one.
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", PLAIN_ANSWER),
        ("permessage-deflate; server_max_window_bits=9, permessage-deflate", SMALL_ANSWER),
        ("permessage-deflate; server_max_window_bits=10", SMALL_ANSWER),
        ('permessage-deflate; server_no_context_takeover; server_max_window_bits="11"', SMALL_ANSWER),
        ("x-webkit-deflate-frame, permessage-deflate; server_max_window_bits=14, permessage-deflate", LIMITED_ANSWER),
        ('x; a="b, permessage-deflate; x=1", permessage-deflate', PLAIN_ANSWER),
        # Declined: RFC 7692 section 7.
        ("permessage-deflate; client_max_window_bits=abc", None),
        ("permessage-deflate; client_max_window_bits=7", None),
        ("permessage-deflate; client_max_window_bits=16", None),
        ("permessage-deflate; client_max_window_bits=09", None),
        ("permessage-deflate; client_max_window_bits=-8", None),
        ("permessage-deflate; client_max_window_bits=1_0", None),
        ("permessage-deflate; client_max_window_bits=", None),
        ("permessage-deflate; client_max_window_bits=\u0661\u0662", None),
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; server_max_window_bits=7", None),
        ("permessage-deflate; server_max_window_bits=8", None),
        ("permessage-deflate; server_max_window_bits=16", None),
        ("permessage-deflate; server_max_window_bits=12; unknown", None),
        ("permessage-deflate; unknown", None),
        ("permessage-deflate; unknown=1; client_max_window_bits", None),
        ("permessage-deflate; client_no_context_takeover=1", None),
        ("permessage-deflate; server_no_context_takeover=true", None),
        ("permessage-deflate; client_max_window_bits; client_max_window_bits=10", None),
        ("permessage-deflate; server_no_context_takeover; Server_No_Context_Takeover", None),
        ("permessage-deflate;", None),
        ("permessage-deflate; =", None),
        ('permessage-deflate; client_max_window_bits="1', None),
        ('permessage-deflate; client_max_window_bits="1\\0"', None),
        ("permessage-deflate-2", None),
        ("x-permessage-deflate", None),
        ("x", None),
        ("", None),
        (",,;", None),
    ],
)
def test_permessage_deflate(offer: str, answer: str | None) -> None:
    result = shake({"sec-websocket-extensions": offer})
    assert dict(result.headers).get("Sec-WebSocket-Extensions") == answer
    assert (result.deflate is None) == (answer is None)
    assert result.deflate is None or result.deflate.header() == answer


def test_permessage_deflate_switched_off() -> None:
    result = shake({"sec-websocket-extensions": "permessage-deflate"}, deflate=False)
    assert result == shake()


@given(st.text(max_size=60), st.text(max_size=30))
def test_odd_lists_are_refused_or_declined_but_never_break(extensions: str, protocols: str) -> None:
    shake({"sec-websocket-extensions": "permessage-deflate" + extensions})
    shake({"sec-websocket-extensions": extensions})
    with contextlib.suppress(ApiError):
        result = shake({"sec-websocket-protocol": protocols}, echo_prefix="")
        assert result.protocol == result.offered[0]


@pytest.mark.parametrize("filler", [",", '"', '",', " ", ";", "permessage-deflate;x,", 'permessage-deflate;a="'])
def test_long_lists_take_linear_time(filler: str) -> None:
    value = "permessage-deflate; a" + filler * (32768 // len(filler))
    start = time.process_time()
    assert shake({"sec-websocket-extensions": value}).deflate is None
    assert time.process_time() - start < 0.5  # a few milliseconds


@pytest.mark.parametrize("extension", [None, PerMessageDeflate(), PerMessageDeflate(server_max_window_bits=12)])
def test_wsprotos_client_takes_our_answer(extension: PerMessageDeflate | None) -> None:
    client = WSConnection(ConnectionType.CLIENT)
    sent = client.send(
        WsprotoRequest(
            host="localhost",
            target="/ws/jobs",
            subprotocols=["bearer.a", "statuswire.v1"],
            extensions=[extension] if extension else [],
        )
    )
    head, *lines = sent.decode().split("\r\n")
    assert head == "GET /ws/jobs HTTP/1.1"
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
    result = shake(dict.fromkeys(GOOD) | headers)
    answer = "".join(f"{name}: {value}\r\n" for name, value in result.headers)
    client.receive_data(f"HTTP/1.1 101 Switching Protocols\r\n{answer}\r\n".encode())
    (event,) = client.events()
    assert isinstance(event, AcceptConnection), event
    assert not isinstance(event, RejectConnection)
    assert event.subprotocol == "statuswire.v1"

    # And both ways through it.
    reader = WebSocketReader(result.deflate, MIB)
    words = "status " * 50
    frame = client.send(TextMessage(words))
    assert (len(frame) < len(words)) == (extension is not None)
    assert reader.receive(frame) == [Text(words)]
    client.receive_data((deflated_text_frame if extension else text_frame)(words.encode()))
    assert [event.data for event in client.events() if isinstance(event, TextMessage)] == [words]
