"""``POST /api/webhooks/{name}``: what another system says, signed, becomes a notification as it is configured."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec

from protocol.errors import ApiError, invalid_field
from protocol.messages import NotifyMessage
from protocol.notice import Notice, check_notice
from protocol.signatures import check_signature, check_signed_headers
from server.answers import Response, json_answer
from server.auth import Identity
from server.config import Webhook
from server.exchange import Exchange
from server.notices import send
from server.routes.intake import JSON_TYPES, position, read_body, unsupported

MAX_BODY: Final = 256 * 1024


async def receive(exchange: Exchange) -> Response:
    """Take one in: 202 once it is kept.

    A body that is sent again under the same timestamp is known by its signature, which is its idempotency key: such
    keys are kept for longer than a timestamp is good for.

    Raises:
        ApiError: 404 for a name that is not configured, 401 ``bad_signature``, 409 ``replayed``, 411, 413, 415, and 422
            where the body does not have what the configuration points to.
    """
    name = exchange.params["name"]
    webhook = exchange.node.config.webhooks.get(name)
    if webhook is None:
        raise ApiError(404, "webhook_not_found", f"there is no webhook {name[:64]!r} in the configuration")
    header = exchange.request.header
    timestamp, signature = header("x-timestamp"), header("x-signature-256")
    # Whoever cannot even claim to know the secret sends no body.
    check_signed_headers(timestamp, signature, time.time())
    if exchange.request.content_type not in JSON_TYPES:
        raise unsupported(exchange.request.content_type, "application/json")
    body = await read_body(exchange, MAX_BODY)
    # The time is looked at again: a body may be minutes on its way, and keys are kept no longer than they need to be.
    key = check_signature(webhook.secret, timestamp, signature, body, time.time())
    sender = Identity(f"webhook:{name}", capabilities=frozenset({"notify"}))
    delivered, accepted = await send(exchange.node, sender, _notice(webhook, body), key)
    if accepted.duplicate:
        raise ApiError(409, "replayed", "this very request was taken in before")
    return json_answer(202, {"delivered": delivered, "id": position(exchange, accepted)})


def _notice(webhook: Webhook, body: bytes) -> Notice:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(400, "malformed_json", f"the body is not JSON: {error}") from None
    message = NotifyMessage(
        target=webhook.target,
        event=webhook.event,
        data=_at(document, webhook.data),
        store=webhook.store,
    )
    if webhook.target != "broadcast":
        ids = _ids(webhook, document)
        if webhook.target in ("users", "channels"):
            message.target_ids = ids
        elif len(ids) == 1:
            message.target_id = ids[0]
        else:
            raise invalid_field(webhook.target_id, f"target {webhook.target!r} needs one id, not {len(ids)}")
    return check_notice(message)


def _ids(webhook: Webhook, document: Any) -> list[str]:
    """The ids that the notification is for. Many systems number their users."""
    if not webhook.target_id.startswith("/"):
        return [webhook.target_id]
    found = _at(document, webhook.target_id)
    ids = []
    for each in found if isinstance(found, list) else [found]:
        if not isinstance(each, str | int) or isinstance(each, bool):
            raise invalid_field(webhook.target_id, "must be an id or a list of ids")
        ids.append(str(each))
    return ids


def _at(document: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) points to."""
    from jsonpointer import JsonPointerException, resolve_pointer  # imported here: few servers have webhooks

    try:
        return resolve_pointer(document, pointer)
    except JsonPointerException:
        raise invalid_field(pointer, "is not in the body, and the configuration of this webhook points to it") from None
