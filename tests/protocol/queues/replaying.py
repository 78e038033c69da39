"""Takes sightings in as a broker does, so that what a queue said can be replayed into records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protocol.job import apply, create, is_repeat, record_of
from protocol.queues.sighting import Known, Sighting, adopts, inherit, job_id, known_of, moved, settle
from protocol.update import Job, format_time

NOW = 1_795_300_000_000
FIXTURES = Path(__file__).parents[2] / "fixtures" / "queues"


def captured(name: str) -> Any:
    """What was captured of real software."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


class Replay:
    """Records that come of sightings.

    Attributes:
        jobs: by id.
        rows: of each update that was accepted: job, status, progress, message, time, as the record has them after it.
    """

    def __init__(self, source: str = "src") -> None:
        self.source = source
        self.jobs: dict[str, Job] = {}
        self.rows: list[tuple[Any, ...]] = []
        self.offset = 0

    def known(self, name: str) -> Known | None:
        job = self.jobs.get(name)
        return None if job is None else known_of(job)

    def see(self, seen: Sighting | None) -> bool:
        """Take one in; False if it came to nothing."""
        if seen is None:
            return False
        name = job_id(seen.queue, seen.job)
        known = self.known(name)
        if known is not None and adopts(known, seen, self.source):
            seen, known = inherit(known, seen), None
            del self.jobs[name]
        fields = settle(known, seen, self.source)
        if fields is None:
            return False
        job = self.jobs.get(name)
        if job is None:
            assert isinstance(fields.user_id, str)
            job = create(fields, job_id=name, user_id=fields.user_id, offset=self.offset + 1, now_ms=NOW)
        else:
            assert not is_repeat(job, fields)
            job = apply(job, fields, offset=self.offset + 1, now_ms=NOW)
        self.offset += 1
        self.jobs[name] = job
        # What is foreseen of an update is what it comes to.
        assert moved(known, fields, self.source) == known_of(job)
        record = record_of(job)
        self.rows.append((name, record.status, record.progress, record.message, record.timestamp))
        return True

    def shown(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.jobs[name].latest.body)
        return document

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """The rows of one job, without its id and the times."""
        return [row[1:4] for row in self.rows if row[0] == name]


def at(ms: int) -> str:
    return format_time(ms)
