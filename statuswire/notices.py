"""Notifications: named events for people and programs that are connected, apart from any job.

    >>> from statuswire import send_to_user
    >>> send_to_user("alice", "export_ready", {"url": "/files/1.pdf"}, wait=False)
    0

Each call returns how many connections got it, or with ``wait=False`` returns 0 at once and sends it in the background.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypedDict, Unpack

import msgspec

from statuswire.client import Client, default_client
from statuswire.fields import frozen

Target = Literal["client", "user", "users", "channel", "channels", "broadcast"]

_encode = msgspec.json.Encoder().encode


class Options(TypedDict, total=False):
    """What all of them can be given besides.

    Attributes:
        metadata: shown beside the data.
        store: keep it for users who are offline, until they have acknowledged it.
        wait: False sends it in the background.
        client: the way to the server, else the one of ``configure`` or the environment.
    """

    metadata: Mapping[str, Any] | None
    store: bool
    wait: bool
    client: Client | None


def send(
    target: Target,
    to: str | Iterable[str] | None,
    event: str,
    data: Any = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    store: bool = False,
    wait: bool = True,
    client: Client | None = None,
) -> int:
    """Send a notification; how many connections got it.

    Args:
        to: an id for one of something, several for ``users`` and ``channels``, None for ``broadcast``.

    Raises:
        Rejected, Unavailable: with ``strict``; else that is logged, and nobody got it.
    """
    message: dict[str, Any] = {"target": target, "event": event, "data": frozen(data)}
    if isinstance(to, str):
        message["targetId"] = to
    elif to is not None:
        message["targetIds"] = list(to)
    if metadata is not None:
        message["metadata"] = frozen(metadata)
    if store:
        message["store"] = True
    client = client or default_client()
    if wait:
        return client.send_notice(_encode(message))
    client.post_notice(_encode(message))
    return 0


def send_to_client(client_id: str, event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To one connection, by the ``clientId`` that it was told."""
    return send("client", client_id, event, data, **options)


def send_to_user(user: str, event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To all connections of a user."""
    return send("user", user, event, data, **options)


def send_to_users(users: Iterable[str], event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To all connections of several users."""
    return send("users", users, event, data, **options)


def send_to_channel(channel: str, event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To those who have joined a channel."""
    return send("channel", channel, event, data, **options)


def send_to_channels(channels: Iterable[str], event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To those who have joined one of several channels."""
    return send("channels", channels, event, data, **options)


def broadcast(event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To everybody."""
    return send("broadcast", None, event, data, **options)


class Kind(NamedTuple):
    """A sort of notification that many applications have.

    Attributes:
        event: its name.
        target: whom it goes to.
        fields: what its data must have.
        to: the id it always goes to, None if the caller says whom.
        store: whether it is kept for users who are offline.
    """

    event: str
    target: Target
    fields: tuple[str, ...]
    to: str | None = None
    store: bool = False


KINDS: Final[dict[str, Kind]] = {
    "payment": Kind("payment", "user", ("paymentId", "status"), store=True),
    "user_account": Kind("user_account", "user", ("change",), store=True),
    "video_processing": Kind("video_processing", "user", ("videoId", "status")),
    "data_export": Kind("data_export", "user", ("exportId", "status"), store=True),
    "post_update": Kind("post_update", "channel", ("postId", "change")),
    "profile_update": Kind("profile_update", "user", ("change",)),
    "system_health": Kind("system_health", "channel", ("status",), to="system"),
    "system_maintenance": Kind("system_maintenance", "broadcast", ("message",)),
}


class Notify(NamedTuple):
    """Sends notifications of one kind to whom the caller says."""

    kind: Kind

    def __call__(self, to: str, data: Mapping[str, Any], **options: Unpack[Options]) -> int:
        """Send one; see ``send``. Raises ValueError if ``data`` lacks what all of this kind have."""
        return send(self.kind.target, to, self.kind.event, _checked(self.kind, data), **_stored(self.kind, options))


class NotifyAll(NamedTuple):
    """Sends notifications of one kind that always go to the same place."""

    kind: Kind

    def __call__(self, data: Mapping[str, Any], **options: Unpack[Options]) -> int:
        """Send one; see ``send``. Raises ValueError if ``data`` lacks what all of this kind have."""
        kind = self.kind
        return send(kind.target, kind.to, kind.event, _checked(kind, data), **_stored(kind, options))


notify_payment = Notify(KINDS["payment"])
notify_user_account = Notify(KINDS["user_account"])
notify_video_processing = Notify(KINDS["video_processing"])
notify_data_export = Notify(KINDS["data_export"])
notify_post_update = Notify(KINDS["post_update"])
notify_profile_update = Notify(KINDS["profile_update"])
notify_system_health = NotifyAll(KINDS["system_health"])
notify_system_maintenance = NotifyAll(KINDS["system_maintenance"])


def _checked(kind: Kind, data: Mapping[str, Any]) -> Mapping[str, Any]:
    missing = [name for name in kind.fields if name not in data]
    if missing:
        raise ValueError(f"{kind.event}: the data must have {', '.join(missing)}")
    return data


def _stored(kind: Kind, options: Options) -> Options:
    return {"store": True, **options} if kind.store else options
