"""A body is never taken for a request, on any route: not when nobody reads it, not when it comes after the answer."""

from __future__ import annotations

import re

import pytest
import trio

from server.routes import ROUTES
from tests.support import ADMIN, AUTH, PATIENCE_S, InProcess, request_bytes, server

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
BEHIND = b"GET /behind HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
# Every method of every route, and some that it does not have.
ASKED = sorted(
    (method, re.sub(r"\{[^}]+\}", "a", path) + ("?timeout=0" if path.endswith("/poll") else ""))
    for path, methods in {**ROUTES, "/nowhere": {}}.items()
    for method in {*methods, "GET", "HEAD", "OPTIONS", "POST"}
)


async def heard(at: InProcess, head: bytes, body: bytes, *, waiting: bool) -> bytes:
    """All that is answered; ``waiting``: the body comes when there is an answer, be it 100."""
    async with at.connect() as http:
        await http.send(head if waiting else head + body)
        received = b""
        with trio.fail_after(PATIENCE_S):
            try:
                while data := await http.stream.receive_some():
                    received += data
                    if waiting:
                        waiting = False
                        await http.send(body)
                    if b"\r\nContent-Type: text/event-stream\r\n" in received and b"\n\n" in received:
                        break  # nothing is a request from here on
            except trio.BrokenResourceError:
                pass  # a reset, as there was more to read
    return received


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("framing", ["length", "chunked", "length, expect", "chunked, expect"])
async def test_a_body_is_no_request(framing: str, known: bool) -> None:
    waiting = "expect" in framing
    sized = ("Transfer-Encoding", "chunked") if "chunked" in framing else ("Content-Length", str(len(HIDDEN)))
    headers: list[tuple[str, str]] = [sized, *(ADMIN.items() if known else ())]
    if waiting:
        headers.append(("Expect", "100-continue"))
    body = (CHUNKED if "chunked" in framing else HIDDEN) + BEHIND
    async with server(auth=AUTH) as at:
        for method, target in ASKED:
            said = await heard(at, request_bytes(method, target, headers=headers), body, waiting=waiting)
            assert said.startswith(b"HTTP/1.1 "), (method, target)
            assert b"/hidden" not in said, (method, target, said)
        assert b"/hidden" in await heard(at, HIDDEN, BEHIND, waiting=False), "what is a request is heard"
