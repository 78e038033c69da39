"""``/api/sse/…``: sending notifications, acknowledging them, and who is there to get them."""

from __future__ import annotations

import re
from typing import Any, Final

from protocol.errors import ApiError, invalid_field, invalid_parameter
from protocol.fields import is_id
from protocol.messages import decode_ack
from protocol.notice import MAX_NOTICE, decode_notice
from protocol.presence import ClientInfo, Target
from protocol.update import format_time
from server.answers import Response, json_answer
from server.brokers.base import Acknowledge
from server.exchange import Exchange
from server.notices import notified_user, offset_of, send
from server.publishing import wait_kept
from server.routes.intake import JSON_TYPES, idempotency_key, read_body, unsupported
from server.routes.jobs import whole_number

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000
_MAX_ACK: Final = 1024
_AFTER: Final = re.compile(r"[A-Za-z0-9_.:@/-]{1,400}", re.ASCII)


async def send_message(exchange: Exchange) -> Response:
    """``POST /api/sse/message``: 200 with how many live connections get it, and where it stands in the log."""
    notice, key = decode_notice(await _read_json(exchange, MAX_NOTICE))
    header = idempotency_key(exchange)
    delivered, accepted = await send(exchange.node, exchange.caller, notice, key if header is None else header)
    answer: dict[str, Any] = {"delivered": delivered, "id": f"{exchange.node.broker.epoch}:{accepted.offset}"}
    if accepted.duplicate:
        answer["duplicate"] = True
    return json_answer(200, answer)


async def acknowledge(exchange: Exchange) -> Response:
    """``POST /api/sse/ack?userId=``: what was stored for the caller up to this cursor need not come again."""
    node = exchange.node
    user = notified_user(exchange)
    text = decode_ack(await _read_json(exchange, _MAX_ACK)).id
    offset = offset_of(node, text)
    if offset is None:
        raise invalid_field("id", "is no cursor of this log")
    submission = node.broker.submit([Acknowledge(user, offset)])
    await wait_kept(submission)
    result = submission.results[0]
    if isinstance(result, ApiError):
        raise result
    return Response(204)


async def list_connections(exchange: Exchange) -> Response:
    """``GET /api/sse/connections``: the live connections of all nodes, in pages by client id."""
    query, presence = exchange.request.query, exchange.node.presence
    after = query.get("after")
    if after is not None and not _AFTER.fullmatch(after):
        raise invalid_parameter("after", "is not what was given as next")
    connections, following = await presence.everyone(whole_number(query, "limit", DEFAULT_PAGE, 1, MAX_PAGE), after)
    total = await presence.count(Target("broadcast"))
    return json_answer(200, {"connections": [_shown(info) for info in connections], "next": following, "total": total})


async def show_user(exchange: Exchange) -> Response:
    """``GET /api/sse/users/{userId}``: whether a user is there; for the user itself, and with ``ops``."""
    user_id = _id(exchange, "userId")
    if user_id != exchange.caller.user and not exchange.caller.can("ops"):
        raise ApiError(403, "forbidden", "to ask for another user needs the capability 'ops'", field="userId")
    count = len(await exchange.node.presence.of_user(user_id))
    return json_answer(200, {"userId": user_id, "online": count > 0, "connections": count})


async def disconnect_user(exchange: Exchange) -> Response:
    """``DELETE /api/sse/users/{userId}``: end all connections of a user."""
    return json_answer(200, {"disconnected": await exchange.node.presence.disconnect_user(_id(exchange, "userId"))})


async def show_client(exchange: Exchange) -> Response:
    """``GET /api/sse/clients/{clientId}``: whether it is connected; for its user, and with ``ops``.

    A foreign one looks like one that is not there.
    """
    client_id, caller = _id(exchange, "clientId"), exchange.caller
    info = await exchange.node.presence.find(client_id)
    if info is None or (info.user != caller.user and not caller.can("ops")):
        return json_answer(200, {"clientId": client_id, "connected": False})
    return json_answer(200, {**_shown(info), "connected": True})


async def disconnect_client(exchange: Exchange) -> Response:
    """``DELETE /api/sse/clients/{clientId}``: end one connection."""
    client_id = _id(exchange, "clientId")
    if not await exchange.node.presence.disconnect_client(client_id):
        raise ApiError(404, "client_not_found", f"there is no client {client_id!r}")
    return Response(204)


async def _read_json(exchange: Exchange, limit: int) -> bytes:
    if exchange.request.content_type not in JSON_TYPES:
        raise unsupported(exchange.request.content_type, "application/json")
    return await read_body(exchange, limit)


def _id(exchange: Exchange, name: str) -> str:
    text = exchange.params[name]
    if not is_id(text):
        raise invalid_parameter(name, f"{text[:128]!r} is not an id: 1 to 128 of A-Z a-z 0-9 _ . : @ -")
    return text


def _shown(info: ClientInfo) -> dict[str, Any]:
    shown: dict[str, Any] = {"clientId": info.client_id, "userId": info.user}
    if info.username is not None:
        shown["username"] = info.username
    return shown | {
        "transport": info.transport,
        "address": info.address,
        "connectedAt": format_time(info.since_ms),
        "notifications": info.takes_notices,
        "channels": list(info.channels),
    }
