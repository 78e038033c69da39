"""Messages and workers of Dramatiq. ``send`` sends one of each kind for two users."""

from __future__ import annotations

import os
from typing import Any

import behaviours
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import SkipMessage

from statuswire import JobCancelled, flush
from statuswire.hooks.dramatiq import StatusMiddleware

# A worker that is not heard of for a second has its messages given to others.
broker = RedisBroker(url=os.environ["QUEUE_URL"], heartbeat_timeout=1000, maintenance_chance=1_000_000)
broker.add_middleware(StatusMiddleware(ttl=2, raise_on_cancel=True, results=True))


class Revoking(dramatiq.Middleware):
    def before_process_message(self, broker: Any, message: Any) -> None:
        if message.actor_name == "revoked":
            raise SkipMessage


broker.add_middleware(Revoking())
dramatiq.set_broker(broker)


@dramatiq.actor
def ok(*, user_id: str, secret: str) -> object:
    return behaviours.ok()


@dramatiq.actor(max_retries=0)
def bad(*, user_id: str, secret: str) -> None:
    behaviours.bad()


@dramatiq.actor(max_retries=3, min_backoff=10, max_backoff=20)
def flaky(*, user_id: str, secret: str) -> None:
    if behaviours.first_time(f"flaky-{user_id}"):
        behaviours.bad()


@dramatiq.actor
def revoked(*, user_id: str, secret: str) -> None:
    raise AssertionError("it was to be skipped")


@dramatiq.actor(throws=JobCancelled)
def asked(*, user_id: str, secret: str) -> None:
    behaviours.asked()


@dramatiq.actor(queue_name="fragile")
def die(*, user_id: str, secret: str) -> None:
    if behaviours.first_time(f"die-{user_id}"):
        behaviours.die()


@dramatiq.actor
def nobodys(*, secret: str) -> None:
    pass


if __name__ == "__main__":
    for user in ("alice", "bob"):
        for actor in (ok, bad, flaky, revoked, asked):
            message = actor.send(user_id=user, secret="not for everybody")
            print(f"{actor.actor_name}-{user}", message.message_id)
    print("die-alice", die.send(user_id="alice", secret="not for everybody").message_id)
    print("nobodys", nobodys.send(secret="not for everybody").message_id)
    assert flush(30)
