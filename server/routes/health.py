"""Is it alive, and should it get traffic."""

from __future__ import annotations

from protocol.errors import ApiError
from server.answers import Response, json_answer
from server.exchange import Exchange


async def health(exchange: Exchange) -> Response:
    """``GET /health``: the process serves its loop."""
    return json_answer(200, {"status": "ok"})


async def ready(exchange: Exchange) -> Response:
    """``GET /ready``: 503 with a reason while draining or while the store is away.

    A job queue that is away is told, but is no reason to send readers elsewhere.
    """
    node = exchange.node
    reason = "draining" if node.draining else node.broker.available
    if reason is None:
        queues = {} if node.queues is None else {"queues": node.queues.states()}
        return json_answer(200, {"status": "ready", **queues})
    error = ApiError(503, "draining" if node.draining else "store_unavailable", reason)
    answer = {"status": "unavailable", "reason": reason, **error.body(exchange.request_id)}
    return json_answer(503, answer, ("Retry-After", "1"))
