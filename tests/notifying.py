"""Notifications as they are sent and read, and updates in between."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

from protocol.fields import decode_fields
from server.brokers.base import Accepted, Publish
from tests.streams import SseEvent, Stream, stream_at
from tests.support import Address, Answer, Headers, InProcess, bearer

SENDER = bearer("app", capabilities=["notify"])


async def put(to: InProcess, job_id: str, user: str = "ann", **fields: object) -> None:
    """Publish one update, past HTTP, and wait until it is shown."""
    data = decode_fields(json.dumps({"userId": user} | fields).encode())
    submission = to.node.broker.submit([Publish(job_id, data, "may", user)])
    await submission.wait_kept()
    assert isinstance(submission.results[0], Accepted), submission.results


async def send(
    to: Address, target: str, name: Any = None, event: str = "note", headers: Headers = SENDER, **more: Any
) -> dict[str, Any]:
    """Send a notification, which must be taken."""
    answer = await post(to, target, name, event, headers, **more)
    assert answer.status == 200, answer
    body = answer.json
    assert isinstance(body, dict)
    return body


async def post(
    to: Address, target: str, name: Any = None, event: str = "note", headers: Headers = SENDER, **more: Any
) -> Answer:
    message: dict[str, Any] = {"target": target, "event": event, "data": {"n": 1}} | more
    if name is not None:
        message["targetIds" if isinstance(name, list) else "targetId"] = name
    return await to.post("/api/sse/message", message, headers)


@asynccontextmanager
async def notified(to: Address, headers: Headers = (), **query: object) -> AsyncIterator[tuple[Stream, SseEvent]]:
    """A stream of notifications and its first event."""
    async with stream_at(to, f"/api/sse?{urlencode(query, safe=',:')}", headers=headers) as stream:
        assert stream.status == 200, (stream.status, await stream.http.rest())
        hello = await stream.event()
        assert hello.name == "connected", hello
        yield stream, hello
