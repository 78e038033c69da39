"""Report on jobs, and send notifications, from Python workers.

This is for synchronous code; ``statuswire.aio`` is the same for asyncio and trio. Nothing here blocks or breaks the
worker: see ``statuswire.jobs``.
"""

from __future__ import annotations

from statuswire.client import Client, configure, default_client
from statuswire.errors import JobCancelled, Rejected, StatuswireError, Unavailable
from statuswire.fields import Fields
from statuswire.jobs import (
    Job,
    cancel_task,
    complete_task,
    create_task,
    fail_task,
    job,
    publish,
    track,
    update_task,
)
from statuswire.notices import (
    broadcast,
    notify_data_export,
    notify_payment,
    notify_post_update,
    notify_profile_update,
    notify_system_health,
    notify_system_maintenance,
    notify_user_account,
    notify_video_processing,
    send,
    send_to_channel,
    send_to_channels,
    send_to_client,
    send_to_user,
    send_to_users,
)

__all__ = [
    "Client",
    "Fields",
    "Job",
    "JobCancelled",
    "Rejected",
    "StatuswireError",
    "Unavailable",
    "broadcast",
    "cancel_task",
    "complete_task",
    "configure",
    "create_task",
    "default_client",
    "fail_task",
    "flush",
    "job",
    "notify_data_export",
    "notify_payment",
    "notify_post_update",
    "notify_profile_update",
    "notify_system_health",
    "notify_system_maintenance",
    "notify_user_account",
    "notify_video_processing",
    "publish",
    "send",
    "send_to_channel",
    "send_to_channels",
    "send_to_client",
    "send_to_user",
    "send_to_users",
    "track",
    "update_task",
]


def flush(timeout: float = 10.0) -> bool:
    """Send what there is, also what dead processes left; whether all of it was answered within ``timeout`` seconds."""
    return default_client().flush(timeout)
