"""Tasks and workers of Huey."""

from __future__ import annotations

import os

import behaviours
from huey import RedisHuey

from statuswire import flush
from statuswire.hooks.huey import report

huey = RedisHuey("tests", url=os.environ["QUEUE_URL"])
report(huey, ttl=2, raise_on_cancel=True, results=True)
# Huey forgets what a worker had that was killed.
fragile = RedisHuey("fragile", url=os.environ["QUEUE_URL"])
report(fragile, ttl=2)


@huey.task()
def ok(user_id: str, secret: str) -> object:
    return behaviours.ok()


@huey.task()
def bad(user_id: str, secret: str) -> None:
    behaviours.bad()


@huey.task(retries=3)
def flaky(user_id: str, secret: str) -> None:
    if behaviours.first_time(f"flaky-{user_id}"):
        behaviours.bad()


@huey.task()
def revoked(user_id: str, secret: str) -> None:
    raise AssertionError("it was to be revoked")


@huey.task()
def asked(user_id: str, secret: str) -> None:
    behaviours.asked()


@fragile.task()
def die(user_id: str, secret: str) -> None:
    behaviours.die()


@huey.task()
def nobodys(secret: str) -> None:
    pass


def send() -> None:
    for user in ("alice", "bob"):
        for task in (ok, bad, flaky, asked):
            print(f"{task.task_class.__name__}-{user}", task(user_id=user, secret="not for everybody").id)
        late = revoked.schedule(delay=1, kwargs={"user_id": user, "secret": "not for everybody"})
        late.revoke()
        print(f"revoked-{user}", late.id)
    print("nobodys", nobodys(secret="not for everybody").id)
    print("die-alice", die(user_id="alice", secret="not for everybody").id)
    assert flush(30)


if __name__ == "__main__":
    # Whoever runs this file imports it under its own name, which the tasks have, too.
    import huey_jobs

    huey_jobs.send()
