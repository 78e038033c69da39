"""Servers that take in job queues, and captured traffic put into a real Redis, for the tests of that."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis as redis_py

from server.node import Node
from tests.support import until

FIXTURES = Path(__file__).parent / "fixtures" / "queues"


def captured(name: str) -> Any:
    """What was captured of real software."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def raw(value: Any) -> bytes:
    """A captured value as it was in Redis."""
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else str(value).encode()


def shown(node: Node, job_id: str) -> dict[str, Any]:
    """A job's record; empty without one."""
    job = node.jobs.get(job_id)
    found: dict[str, Any] = {} if job is None else json.loads(job.latest.body)
    return found


def status(node: Node, job_id: str) -> str | None:
    """Its status."""
    job = node.jobs.get(job_id)
    return None if job is None else job.latest.status


def steps(node: Node, job_id: str) -> list[str]:
    """The statuses a job went through, each once in a row."""
    found: list[str] = []
    for update in node.history.of_job(job_id, 0):
        if not found or found[-1] != update.status:
            found.append(update.status)
    return found


async def until_up(node: Node) -> None:
    """Wait until every source is taken in by this node."""
    assert node.queues is not None
    queues = node.queues
    await until(lambda: all(state["state"] == "up" for state in queues.states().values()))


async def until_status(node: Node, job_id: str, *statuses: str) -> dict[str, Any]:
    """Wait until a job has one of these statuses; its record then."""
    await until(lambda: status(node, job_id) in statuses)
    return shown(node, job_id)


def put_stream(oracle: redis_py.Redis, key: str, entries: Iterable[dict[str, Any]]) -> None:
    """Entries with the ids that they were captured with."""
    for entry in entries:
        oracle.xadd(key, entry["fields"], id=entry["id"])
