"""The words of ``/api/sse``: events with names, the server's own too. No view of jobs, so it has no calls."""

from __future__ import annotations

from typing import Final

from protocol.update import Update
from protocol.view import Control, View


def _body(update: Update) -> bytes:
    return update.body


_FACTS: Final = {name: name for name in ("clientId", "userId", "username", "channels", "heartbeat", "live")}

VIEW: Final = View(
    name="notices",
    noun="notification",
    calls=(),
    variable="notice",
    controls={
        "connected": Control(_FACTS | {"timestamp": "now"}, "connected"),
        "heartbeat": Control({"timestamp": "now", "live": "live"}, "heartbeat"),
        "reset": Control({"reason": "message"}, "reset"),
        "error": Control({"code": "code", "message": "message"}, "error"),
    },
    state=_body,
)
