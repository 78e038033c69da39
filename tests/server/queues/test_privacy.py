"""What jobs carry stays where it is: of arguments, data, results and tracebacks nobody is given anything by default."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from tests.queueing import until_up
from tests.redis_servers import RedisServer, running_server
from tests.streams import event_stream
from tests.support import ADMIN, AUTH, server, until

SECRET = "hunter2"
PYTHON_TRACE = (
    'Traceback (most recent call last):\n  File "/srv/hunter2/tasks.py", line 7, in run\n'
    '    login(password="hunter2")\nRuntimeError: it went wrong'
)
NODE_TRACE = "it went wrong\n    at login (/srv/hunter2/jobs.js:7:3)\n    at async run (hunter2)"
REPORT = {"percent": 40, "message": "Encoding", "stage": "encode", "apiKey": SECRET, "nested": {"token": SECRET}}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_server(tmp_path, "--notify-keyspace-events", "Kgh") as running:
        yield running


def bullmq(oracle: redis_py.Redis) -> None:
    data = json.dumps({"userId": "alice", "password": SECRET})
    for job in ("good", "bad", "kept"):
        oracle.hset(f"bull:video:{job}", mapping={
            "name": "encode", "data": data, "opts": json.dumps({"jobId": job, "x": SECRET}), "timestamp": "1",
            "stacktrace": json.dumps([NODE_TRACE]), "returnvalue": json.dumps(SECRET), "processedOn": "2",
            "progress": json.dumps(REPORT), "finishedOn": "3",
        })  # fmt: skip
    oracle.hset("bull:video:kept", mapping={"failedReason": NODE_TRACE})
    oracle.zadd("bull:video:failed", {"kept": 1})
    for event in (
        {"event": "added", "jobId": "good", "name": "encode", "data": data},
        {"event": "active", "jobId": "good", "prev": "waiting", "token": SECRET},
        {"event": "progress", "jobId": "good", "data": json.dumps(REPORT)},
        {"event": "completed", "jobId": "good", "returnvalue": json.dumps({"url": SECRET})},
        {"event": "active", "jobId": "bad"},
        {"event": "failed", "jobId": "bad", "failedReason": NODE_TRACE, "stacktrace": NODE_TRACE},
    ):
        oracle.xadd("bull:video:events", event)
    oracle.hset("bull:video:meta", "version", "bullmq:6.7.0")


def bull4(oracle: redis_py.Redis) -> None:
    bullmq(oracle)
    oracle.delete("bull:video:events")
    for event, message in (
        ("active@1", "good"),
        ("progress", json.dumps({"jobId": "good", "progress": REPORT})),
        ("completed", json.dumps({"jobId": "good", "val": json.dumps(SECRET), "data": SECRET})),
        ("active@1", "bad"),
        ("failed", json.dumps({"jobId": "bad", "val": NODE_TRACE})),
        ("delayed", "1"),  # so that the hashes are looked at
    ):
        oracle.publish(f"bull:video:{event}", message)
    oracle.set("bull:video:id", 3)


def celery(oracle: redis_py.Redis) -> None:
    kept = {"kwargs": {"user_id": "alice", "password": SECRET}, "args": [SECRET], "children": [SECRET]}

    def tell(task: str, **more: Any) -> None:
        document = {"task_id": task, "name": "encode", "traceback": PYTHON_TRACE, **kept, **more}
        oracle.publish(f"celery-task-meta-{task}", json.dumps(document))

    def event(**fields: Any) -> None:
        text = base64.b64encode(json.dumps([{"hostname": "w@1", "timestamp": 1.0, **fields}]).encode()).decode()
        properties = {"body_encoding": "base64"}
        envelope = {"body": text, "content-type": "application/json", "properties": properties}
        oracle.publish("/0.celeryev/task.multi", json.dumps(envelope))

    told = {"args": repr((SECRET,)), "kwargs": repr({"user_id": "alice", "password": SECRET})}
    for task in ("good", "bad", "kept"):
        event(type="task-received", uuid=task, name="encode", **told)
        event(type="task-started", uuid=task, pid=1, secret=SECRET)
    event(type="task-progress", uuid="good", **REPORT)
    tell("good", status="PROGRESS", result=REPORT)
    tell("good", status="SUCCESS", result={"token": SECRET})
    event(type="task-succeeded", uuid="good", result=repr(SECRET), runtime=0.1)
    wrong = {"exc_type": "RuntimeError", "exc_message": ["it went wrong"], "exc_module": "builtins"}
    tell("bad", status="FAILURE", result=wrong)
    event(type="task-failed", uuid="kept", exception="RuntimeError('it went wrong')", traceback=PYTHON_TRACE)


def rq(oracle: redis_py.Redis) -> None:
    call = zlib.compress(pickle.dumps(("jobs.encode", None, (SECRET,), {"password": SECRET})))
    for job, status in (("good", "finished"), ("bad", "failed"), ("kept", "failed")):
        oracle.xadd(f"rq:results:{job}", {
            "type": 1, "return_value": base64.b64encode(pickle.dumps(SECRET)),
            **({"exc_string": base64.b64encode(zlib.compress(PYTHON_TRACE.encode()))} if job == "bad" else {}),
        })  # fmt: skip
        oracle.hset(f"rq:job:{job}", mapping={
            "created_at": "2026-01-01T00:00:00Z", "status": status, "data": call, "origin": "video",
            "description": f"jobs.encode({SECRET!r})", "result": pickle.dumps(SECRET),
            "meta": pickle.dumps({"user_id": "alice", "progress": 40, "message": "Encoding", "password": SECRET}),
            **({"exc_info": zlib.compress(PYTHON_TRACE.encode())} if status == "failed" else {}),
        })  # fmt: skip
    oracle.xtrim("rq:results:kept", 0)


@pytest.mark.parametrize("fill", [bullmq, bull4, celery, rq])
async def test_nothing_of_what_jobs_carry_is_shown(
    fill: Callable[[redis_py.Redis], None], redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    queues = {"queues.q": {"kind": fill.__name__, "url": f"{redis.url}/0"}}
    prefix = "video:" if fill in (bullmq, bull4) else ""
    async with server(auth=AUTH, store={"url": "memory:"}, **queues) as one:
        await until_up(one.node)
        async with event_stream(one, headers=ADMIN) as stream:
            with redis.oracle() as oracle:
                fill(oracle)
            jobs = one.node.jobs
            await until(lambda: len(jobs) == 3 and all(job.latest.ended for job in jobs.jobs.values()))
            seen = []
            while len({event["jobId"] for event in seen if event.get("endedAt")}) < 3:
                seen.append((await stream.event()).data)
        shown = json.dumps(seen)
        for path in ("jobs", f"jobs/{prefix}good", f"jobs/{prefix}bad/history", "jobs/poll?timeout=0", "stats"):
            answer = await one.ask("GET", f"/api/v2/{path}", headers=ADMIN)
            assert answer.status == 200, path
            shown += answer.body.decode()
        for path in ("/metrics", "/ready"):
            shown += (await one.ask("GET", path, headers=ADMIN)).body.decode()
        assert "it went wrong" in shown
        assert '"alice"' in shown
        # What was reported to be seen is.
        assert "Encoding" in shown
    for hidden in (SECRET, "Traceback", "tasks.py", "jobs.js"):
        assert hidden not in shown
        assert hidden not in caplog.text
