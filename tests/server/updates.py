"""Publishing over HTTP: paths, lines, and what the answers say."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.support import ADMIN, Address, Answer

CURSOR = re.compile(r"[a-z0-9]+:[0-9]+")
NDJSON = {"Content-Type": "application/x-ndjson"}
JOBS, UPDATES = "/api/v2/jobs", "/api/v2/updates"


def offset(answer: Answer) -> int:
    cursor = answer.json["id"]
    assert CURSOR.fullmatch(cursor), cursor
    return int(cursor.rpartition(":")[2])


def lines(*updates: object) -> bytes:
    return b"".join(json.dumps(update).encode() + b"\n" for update in updates)


async def record(at: Address, job_id: str) -> dict[str, Any]:
    answer = await at.get(f"{JOBS}/{job_id}", ADMIN)
    assert answer.status == 200, answer
    found = answer.json
    assert isinstance(found, dict)
    return found
