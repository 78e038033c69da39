"""Jobs in their own words: the view that the others are worded after. Its paths have handlers of their own."""

from __future__ import annotations

from typing import Final

from protocol.update import Update
from protocol.view import Control, View


def _record(update: Update) -> bytes:
    return update.body


VIEW: Final = View(
    name="jobs",
    noun="job",
    calls=(),
    variable="jobId",
    controls={
        "connected": Control(
            {"clientId": "clientId", "userId": "userId", "heartbeat": "heartbeat", "live": "live", "timestamp": "now"}
        ),
        "heartbeat": Control({"timestamp": "now", "live": "live"}),
        "reset": Control({"reason": "message"}),
        "error": Control({"code": "code", "message": "message"}),
    },
    state=_record,
)
