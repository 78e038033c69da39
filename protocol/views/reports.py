"""Report status: ``/api/projects/{projectId}/initial-report-status``. A project's report is one job of its owner.

The project is known as soon as that job is there, queued: its report is not started then. The phase is the job's
stage; what no job has (freshness, completeness and the like) is in its metadata.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from protocol.errors import ApiError, invalid_field
from protocol.fields import MAX_PAYLOAD, Count, Fields, Moment, Steps, decode_checked, time_ms
from protocol.job import Record
from protocol.update import (
    CANCELLED,
    COMPLETED,
    FAILED,
    JOB_DELETED,
    PROCESSING,
    QUEUED,
    STALLED,
    Job,
    Update,
    format_time,
)
from protocol.view import Call, Control, Message, View, encode_safe, one_line, only_of_its_kind

PATH: Final = "/api/projects/{projectId}/initial-report-status"
KIND: Final = "initial-report"

Words = Literal["not_started", "generating", "completed", "failed"]

STATUSES: Final[dict[str, Words]] = {
    QUEUED: "not_started",
    PROCESSING: "generating",
    STALLED: "generating",
    COMPLETED: "completed",
    FAILED: "failed",
    CANCELLED: "failed",
}
# How far a report is when a phase begins. Capturing goes on from there to the second number.
PHASES: Final = {
    "validation": (5, 5),
    "snapshot_capture": (10, 50),
    "data_collection": (55, 55),
    "analysis": (75, 75),
    "report_generation": (90, 90),
    "completed": (100, 100),
}
CAPTURE: Final = "snapshot_capture"
_CAPTURED: Final = "competitorSnapshotsStatus"
# What a publisher may say of it without the object around.
_SHORT: Final = ("captured", "total")
# What a report takes, until its progress tells.
USUAL_S: Final = 45


# As many characters as fit into the bytes of a text field, whatever they are.
Word = Annotated[str, Meta(max_length=512)]
Score = Annotated[int, Meta(ge=0, le=100)] | Annotated[float, Meta(ge=0, le=100)]


class Snapshots(msgspec.Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """``competitorSnapshotsStatus``. What an update leaves out of it stays as it is."""

    captured: Count | UnsetType = UNSET
    total: Count | UnsetType = UNSET
    current: Word | int | UnsetType | None = UNSET
    captured_at: Moment | UnsetType | None = UNSET


class Details(msgspec.Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """What is known of a report beside the fields of a job; null clears."""

    report_id: Word | UnsetType | None = UNSET
    data_completeness_score: Score | UnsetType | None = UNSET
    generated_at: Moment | UnsetType | None = UNSET
    competitor_snapshots_status: Snapshots | UnsetType | None = UNSET
    data_freshness: Literal["new", "existing", "mixed"] | UnsetType | None = UNSET
    queue_position: Count | UnsetType | None = UNSET


class Published(Details):
    """All that is published of a report and means something else than the field of a job."""

    phase: (
        Literal["validation", "snapshot_capture", "data_collection", "analysis", "report_generation", "completed"]
        | UnsetType
    ) = UNSET
    captured: Count | UnsetType = UNSET
    total: Count | UnsetType = UNSET


class Status(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True):
    """A project's report: what it has not is left out. Times are RFC 3339 texts."""

    project_id: str
    report_exists: bool
    report_id: str | None = None
    status: Words
    phase: str | None = None
    progress: int | float
    message: str | None = None
    data_completeness_score: int | float | None = None
    generated_at: str | None = None
    competitor_snapshots_status: dict[str, Any] | None = None
    data_freshness: str | None = None
    queue_position: int | None = None
    estimated_completion_time: str | None = None
    stalled: bool = False
    error: str | None = None
    timestamp: str


_DETAILS: Final = {field.encode_name: "" for field in msgspec.structs.fields(Details)}
_decode = msgspec.json.Decoder(Record).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_details = msgspec.json.Decoder(Details)
_SNAPSHOTS: Final = tuple(field.encode_name for field in msgspec.structs.fields(Snapshots))


# Publishing


def _unpack(values: dict[str, Any]) -> dict[str, Any]:
    """Check the details, and put them where they are kept."""
    if "phase" in values:
        phase = msgspec.json.decode(values["phase"])
        if not isinstance(phase, str) or phase not in PHASES:
            raise invalid_field("phase", f"must be one of {', '.join(PHASES)}")
    short = {name: values.pop(name) for name in _SHORT if name in values}
    if short:
        around = msgspec.json.decode(values.get(_CAPTURED, b"null"))
        if around is None or isinstance(around, dict):
            values[_CAPTURED] = short | (around or {})
    given = {name: values.pop(name) for name in _DETAILS if name in values}
    if given:
        details = decode_checked(msgspec.json.encode(given), _details, _DETAILS, _SNAPSHOTS)
        kept = msgspec.to_builtins(details)
        if isinstance(details.generated_at, datetime):
            kept["generatedAt"] = format_time(time_ms(details.generated_at, "generatedAt"))
        snapshots = details.competitor_snapshots_status
        if isinstance(snapshots, Snapshots) and isinstance(snapshots.captured_at, datetime):
            at_ms = time_ms(snapshots.captured_at, "competitorSnapshotsStatus.capturedAt")
            kept["competitorSnapshotsStatus"]["capturedAt"] = format_time(at_ms)
        values["metadata"] = kept
    return values


def _settle(job: Job | None, fields: Fields) -> Fields:
    """Details are merged, and progress and status follow from the phase where they are not given."""
    only_of_its_kind(job, fields)
    record = None if job is None else _decode(job.latest.body)
    before = {} if record is None else _details_of(record)
    changed: dict[str, Any] = {}
    if record is not None and fields.attempt is not UNSET and fields.attempt > record.attempt:
        before = {}  # another report
        changed["metadata"] = changed["steps"] = None
    details = before
    given: object = fields.metadata
    if isinstance(given, Raw):
        details = _merged(before, _decode_object(given))
        changed["metadata"] = Raw(msgspec.json.encode(details))
        if len(changed["metadata"]) > MAX_PAYLOAD:
            raise ApiError(422, "invalid_update", f"what is kept of a report may have {MAX_PAYLOAD} bytes in all")
    snapshots = details.get(_CAPTURED) or {}
    if snapshots != (before.get(_CAPTURED) or {}):
        names = {"done": "captured", "total": "total", "current": "current"}
        steps = {step: snapshots[name] for step, name in names.items() if name in snapshots}
        changed["steps"] = msgspec.convert(steps, Steps) if steps else None
    phase = fields.stage
    if phase is UNSET and fields.status == COMPLETED:
        phase = changed["stage"] = "completed"
    if phase is not UNSET and fields.status is UNSET:
        changed["status"] = COMPLETED if phase == "completed" else PROCESSING
    known = phase if phase is not UNSET else record.stage if record is not None else None
    moved = phase is not UNSET or "steps" in changed
    if fields.progress is UNSET and moved and known in PHASES:
        changed["progress"] = _progress_of(str(known), snapshots)
    return msgspec.structs.replace(fields, **changed) if changed else fields


def _details_of(record: Record) -> dict[str, Any]:
    """The metadata; details that are none, because somebody put them there in the words of jobs, are left out."""
    if not isinstance(record.metadata, Raw):
        return {}
    found = _decode_object(record.metadata)
    return {name: value for name, value in found.items() if name not in _DETAILS or _is_detail(name, value)}


def _is_detail(name: str, value: object) -> bool:
    try:
        msgspec.convert({name: value}, Details)
    except msgspec.ValidationError:
        return False
    return True


def _merged(before: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = before | given
    now, then = given.get(_CAPTURED), before.get(_CAPTURED)
    if isinstance(now, dict):
        known = then if isinstance(then, dict) else {}
        merged[_CAPTURED] = {name: value for name, value in (known | now).items() if value is not None}
    return {key: value for key, value in merged.items() if value is not None}


def _progress_of(phase: str, snapshots: dict[str, Any]) -> float:
    low, high = PHASES[phase]
    total = snapshots.get("total") or 0
    if phase != CAPTURE or not total:
        return low
    return low + (high - low) * min(1.0, (snapshots.get("captured") or 0) / total)


# Reading


def _status(update: Update) -> Status:
    record = _decode(update.body)
    details = _details_of(record)
    word = STATUSES[record.status]
    error = one_line(record.error or "") or None
    return Status(
        project_id=VIEW.id_of(record.job_id),
        report_exists=record.status != QUEUED or details.get("reportId") is not None,
        report_id=details.get("reportId"),
        status=word,
        phase=record.stage,
        progress=record.progress,
        message=record.message,
        data_completeness_score=details.get("dataCompletenessScore"),
        generated_at=details.get("generatedAt") or (record.ended_at if record.status == COMPLETED else None),
        competitor_snapshots_status=_snapshots(record, details),
        data_freshness=details.get("dataFreshness"),
        queue_position=details.get("queuePosition") if record.status == QUEUED else None,
        estimated_completion_time=_completion(record, update.at_ms) if word == "generating" else None,
        stalled=record.status == STALLED,
        error="cancelled" if record.status == CANCELLED else error or ("it failed" if word == "failed" else None),
        timestamp=record.timestamp,
    )


def _snapshots(record: Record, details: dict[str, Any]) -> dict[str, Any] | None:
    """As published in this view, else what the job's steps say while it captures."""
    given = details.get(_CAPTURED)
    if isinstance(given, dict):
        return {"captured": 0, "total": 0} | given
    if record.stage != CAPTURE or not isinstance(record.steps, Raw):
        return None
    steps = _decode_object(record.steps)
    found = {"captured": steps.get("done", 0), "total": steps.get("total", 0), "current": steps.get("current")}
    return {name: value for name, value in found.items() if value is not None}


def _completion(record: Record, at_ms: int) -> str | None:
    if record.estimated_completion_time is not None or record.started_at is None:
        return record.estimated_completion_time
    usual = datetime.fromisoformat(record.started_at) + timedelta(seconds=USUAL_S)
    if usual.timestamp() * 1000 < at_ms:
        return None  # it takes longer than usual, and there is no telling how long
    return usual.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _state(update: Update) -> bytes:
    return encode_safe(_status(update))


def _messages(update: Update) -> list[Message]:
    if update.type != JOB_DELETED:
        return [Message(_state(update))]
    gone = {
        "type": "error",
        "projectId": VIEW.id_of(update.job_id),
        "code": "project_not_found",
        "message": "the project was deleted",
    }
    return [Message(encode_safe(gone), "error")]


VIEW: Final = View(
    name="reports",
    noun="project",
    calls=(
        Call("GET", PATH, "show"),
        Call("POST", PATH, "publish"),
        Call("GET", PATH + "/stream", "stream"),
        Call("PUT", "/api/projects/{projectId}", "register", {"status": QUEUED}),
    ),
    variable="projectId",
    prefix="report:",
    kind=KIND,
    # Named: a page's onmessage gets nothing but states.
    controls={
        "connected": Control({"projectId": "id", "timestamp": "now", "live": "live"}, "connected"),
        "heartbeat": Control({"projectId": "id", "timestamp": "now", "live": "live"}, "heartbeat"),
        "error": Control({"projectId": "id", "code": "code", "message": "message", "timestamp": "now"}, "error"),
    },
    waits=False,
    render=_messages,
    state=_state,
    shape=Status,
    fields={
        "userId": "userId",
        "phase": "stage",
        "status": "status",
        "progress": "progress",
        "message": "message",
        "error": "error",
        "estimatedCompletionTime": "estimatedCompletionTime",
        "estimatedTimeRemaining": "estimatedTimeRemaining",
        **_DETAILS,
        **dict.fromkeys(_SHORT, ""),
        **{name: name for name in ("attempt", "reset", "seq", "eventId", "ttl", "timestamp", "workerId")},
    },
    statuses={"not_started": QUEUED, "generating": PROCESSING, "completed": COMPLETED, "failed": FAILED},
    unpack=_unpack,
    details=Published,
    settle=_settle,
    not_found="project_not_found",
)
