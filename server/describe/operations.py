"""What is said of each call of the table of routes."""

from __future__ import annotations

import re
from typing import Final

from protocol.fields import Fields
from protocol.job import Record
from protocol.messages import Ack, NotifyMessage
from protocol.update import STATUSES
from protocol.watch import ALL_TYPES, MAX_JOB_IDS, RECORD_FIELDS, UPDATE_TYPES
from server.describe.answers import (
    BatchResult,
    CancelRequested,
    ClientState,
    ConnectionList,
    Created,
    CreatedBefore,
    Disconnected,
    Health,
    JobHistory,
    JobList,
    Me,
    NotReady,
    PollAnswer,
    Ready,
    Sent,
    Spooled,
    Stats,
    Updated,
    UserState,
)
from server.describe.model import EVENTS, ID, JSON, TEXT, Answer, Operation, Parameter, Schema, words

CURSOR: Final[Schema] = {"type": "string"}
KINDS: Final[Schema] = {"type": "string", "pattern": r"^\s*[^\s,\u0000][^,\u0000]*(,\s*[^\s,\u0000][^,\u0000]*)*$"}
ID_LIST: Final[Schema] = {"type": "string", "pattern": "^[A-Za-z0-9_.:@-]{1,128}(,[A-Za-z0-9_.:@-]{1,128})*$"}

PLACE: Final[Schema] = {"type": "string", "pattern": "^[A-Za-z0-9_.:@/-]{1,400}$"}

USER: Final = Parameter("userId", "only this user's jobs; for another's one has to be an admin", ID)
FILTER: Final = (
    Parameter("types", "only updates of these types, a comma list", words(*UPDATE_TYPES)),
    Parameter("kind", "only jobs of these kinds, a comma list", KINDS),
    Parameter("status", "only these statuses, a comma list", words(*STATUSES)),
)
FIELDS: Final = Parameter("fields", "only these fields, besides jobId, status and version", words(*RECORD_FIELDS))
WATCH: Final = (
    Parameter(
        "jobIds", f"a comma list of at most {MAX_JOB_IDS}; without it all one's own jobs, for an admin all", ID_LIST
    ),
    USER,
    Parameter("all", "says an admin's default outright", {"type": "string", "enum": ["0", "1", "false", "true"]}),
    *FILTER,
    FIELDS,
)
POLL_WATCH: Final = tuple(
    Parameter("types", "the same; `notification` asks for those as well", words(*ALL_TYPES))
    if each.name == "types"
    else each
    for each in WATCH
)
LAST_SEEN: Final = Parameter(
    "last_seen", "the cursor one has, or a unix time; whatever the log does not know is answered with a reset", CURSOR
)
CURSOR_HEADER: Final = Parameter("Last-Event-ID", "the same, and wins over it", CURSOR, "header")
CHANNELS: Final = Parameter(
    "channels",
    "named channels to hear, a comma list",
    {"type": "string", "pattern": "^(" + ID_LIST["pattern"][1:-1] + ")?$"},
)
KEY: Final = Parameter(
    "Idempotency-Key",
    "the same key with the same body counts once, for five minutes at least",
    {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"},
    "header",
)
IF_NONE_MATCH: Final = Parameter("If-None-Match", "an ETag one has", {"type": "string"}, "header")

TAGGED: Final = (("ETag", "for If-None-Match"),)
UNCHANGED: Final = Answer("what is there has this tag", headers=TAGGED)
OF_A_JOB: Final = (
    *TAGGED,
    ("X-Job-Status", "its status"),
    ("X-Job-Version", "its version"),
    ("X-Job-Progress", "its progress"),
)
SPOOLED: Final = Answer(
    "the store is away: kept on disk, and passed on when it is back",
    Spooled,
    headers=(("Location", "path of the job"),),
)
NO_JOB: Final = "there is no such job, or none that one may see"
UNAVAILABLE: Final = "not now: the store is away, the server is full or goes away"


PAGE_SCRIPTS: Final = ("dashboard", "dom", "jobs", "list", "playground", "session", "stats", "timeline", "wire")


def _file(name: str, what: str, content_type: str) -> Operation:
    answers = {200: Answer(what, {"type": "string"}, content_type, TAGGED), 304: UNCHANGED}
    return Operation(name, "page", what, answers, (IF_NONE_MATCH,))


OPERATIONS: Final[dict[str, Operation]] = {
    "GET /": _file("page", "the dashboard", "text/html"),
    **{
        f"GET /{name}": _file(re.sub(r"\W(\w)", lambda dot: dot[1].upper(), name), what, content_type)
        for name, what, content_type in (
            ("dashboard.css", "the page's style", "text/css"),
            *((f"{name}.js", "a part of the page's script", "text/javascript") for name in PAGE_SCRIPTS),
            ("client.js", "the client for browsers and Node, a module", "text/javascript"),
            ("client.cjs", "the same as a CommonJS module", "text/javascript"),
            ("client.iife.js", "the same as a script that sets `statuswire`", "text/javascript"),
            ("client.d.ts", "its types", "text/plain"),
            ("share.js", "its part that shares a connection between tabs", "text/javascript"),
            ("react.js", "hooks for React", "text/javascript"),
            ("react.d.ts", "their types", "text/plain"),
            ("job-progress.js", "the element `<job-progress>`", "text/javascript"),
        )
    },
    "GET /openapi.json": Operation(
        "openapi", "descriptions", "this description",
        {200: Answer("OpenAPI 3.1", {"type": "object"}, headers=TAGGED), 304: UNCHANGED}, (IF_NONE_MATCH,),
    ),
    "GET /asyncapi.json": Operation(
        "asyncapi", "descriptions", "what is said over WebSocket and event streams",
        {200: Answer("AsyncAPI 3.0", {"type": "object"}, headers=TAGGED), 304: UNCHANGED}, (IF_NONE_MATCH,),
    ),
    "GET /health": Operation("health", "operations", "the process serves", {200: Answer("it does", Health)}),
    "GET /ready": Operation(
        "ready", "operations", "whether it wants traffic",
        {200: Answer("it does", Ready), 503: Answer("it is draining, or the store is away", NotReady,
                                                    headers=(("Retry-After", "seconds"),))},
    ),
    "GET /metrics": Operation(
        "metrics", "operations", "numbers for Prometheus", {200: Answer("text format", {"type": "string"}, TEXT)},
        text="In the format that Accept asks for: the text format, or OpenMetrics.",
    ),
    "GET /api/v2/stats": Operation("stats", "operations", "numbers as JSON", {200: Answer("of all nodes", Stats)}),
    "GET /api/v2/me": Operation(
        "whoAmI", "operations", "who the caller is, and what it may do", {200: Answer("as its token has it", Me)}
    ),
    "GET /api/v2/jobs": Operation(
        "listJobs", "reading", "jobs, newest first",
        {200: Answer("a page of them", JobList)},
        (
            USER, *FILTER, FIELDS,
            Parameter("limit", "most of a page", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
            Parameter("after", "the next of the page before", {"type": "integer", "minimum": 0, "maximum": 2**63}),
        ),
    ),
    "POST /api/v2/jobs": Operation(
        "createJob", "publishing", "create a job",
        {
            200: Answer("a repeat: it was created before", CreatedBefore),
            201: Answer("created", Created, headers=(("Location", "path of the job"),)),
            202: SPOOLED,
        },
        (KEY,), {JSON: Fields},
        errors={404: "there is no such parent", 409: "there is a job of that id"},
        text="userId is the caller if it is left out, jobId is made up.",
    ),
    "GET /api/v2/jobs/poll": Operation(
        "poll", "reading", "wait for updates",
        {200: Answer("updates, maybe none", PollAnswer)},
        (
            *POLL_WATCH, LAST_SEEN, CHANNELS,
            Parameter("timeout", "seconds to wait, 60 at most", {"type": "number", "minimum": 0, "default": 30}),
            Parameter("client_id", "a name under which the server shall remember the cursor", ID),
        ),
    ),
    "GET /api/v2/jobs/stream": Operation(
        "stream", "reading", "an event stream of updates",
        {
            200: Answer("see asyncapi.json", {"type": "string"}, EVENTS),
            204: Answer("all of the named jobs have ended, and the cursor is behind their ends"),
        },
        (*WATCH, LAST_SEEN, CURSOR_HEADER),
    ),
    "GET /api/v2/jobs/{jobId}": Operation(
        "showJob", "reading", "one job",
        {200: Answer("its record", Record, headers=OF_A_JOB), 304: Answer("unchanged", headers=OF_A_JOB)},
        (FIELDS, IF_NONE_MATCH), errors={404: NO_JOB},
    ),
    "DELETE /api/v2/jobs/{jobId}": Operation(
        "deleteJob", "publishing", "forget a job", {204: Answer("it is gone")}, errors={404: NO_JOB}
    ),
    "POST /api/v2/jobs/{jobId}/updates": Operation(
        "updateJob", "publishing", "one update of a job",
        {200: Answer("accepted", Updated), 202: SPOOLED}, (KEY,), {JSON: Fields},
        errors={404: "there is no such job, and no userId to create it with; or no such parent",
                409: "against the job's state"},
        text="What it leaves out keeps its value. Creates the job if it has a userId.",
    ),
    "GET /api/v2/jobs/{jobId}/history": Operation(
        "jobHistory", "reading", "the kept updates of a job", {200: Answer("oldest first", JobHistory)},
        (*FILTER, FIELDS), errors={404: NO_JOB},
    ),
    "POST /api/v2/jobs/{jobId}/cancel": Operation(
        "cancelJob", "publishing", "ask a job to stop",
        {202: Answer("its worker and its watchers are told", CancelRequested)},
        errors={404: NO_JOB, 409: "it has ended", 413: "a body is not needed"},
        text="By its owner or an admin.",
    ),
    "POST /api/v2/updates": Operation(
        "publishBatch", "publishing", "many updates, each for itself",
        {200: Answer("what became of them", BatchResult)}, (KEY,),
        {
            JSON: {"type": "array", "maxItems": 100_000, "items": {}},
            "application/x-ndjson": {"type": "string"},
        },
        text="A JSON array of updates with their jobId, or one a line. One that is refused spoils no other.",
    ),
    "GET /api/sse": Operation(
        "noticeStream", "notifications", "an event stream of notifications",
        {200: Answer("see asyncapi.json", {"type": "string"}, EVENTS)},
        (
            Parameter("userId", "whose; for another's one has to be an admin", ID),
            Parameter("username", "what the user calls itself", {"type": "string", "maxLength": 128}),
            CHANNELS, LAST_SEEN, CURSOR_HEADER,
        ),
    ),
    "POST /api/sse/message": Operation(
        "sendNotification", "notifications", "send a notification", {200: Answer("sent", Sent)}, (KEY,),
        {JSON: NotifyMessage}, text="targetIds for users and channels, targetId for client, user and channel.",
    ),
    "POST /api/sse/ack": Operation(
        "acknowledge", "notifications", "stored notifications up to a cursor need not come again",
        {204: Answer("noted")}, (Parameter("userId", "whose; for another's one has to be an admin", ID),), {JSON: Ack},
    ),
    "GET /api/sse/connections": Operation(
        "listConnections", "notifications", "who is connected", {200: Answer("a page", ConnectionList)},
        (
            Parameter("limit", "most of a page", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
            Parameter("after", "the next of the page before", PLACE),
        ),
    ),
    "GET /api/sse/users/{userId}": Operation(
        "showUser", "notifications", "whether a user is connected", {200: Answer("it is, or not", UserState)}
    ),
    "DELETE /api/sse/users/{userId}": Operation(
        "disconnectUser", "notifications", "end all connections of a user", {200: Answer("so many", Disconnected)}
    ),
    "GET /api/sse/clients/{clientId}": Operation(
        "showClient", "notifications", "whether a client is connected", {200: Answer("it is, or not", ClientState)}
    ),
    "DELETE /api/sse/clients/{clientId}": Operation(
        "disconnectClient", "notifications", "end a connection", {204: Answer("it is ended")},
        errors={404: "there is none"},
    ),
    "POST /api/webhooks/{name}": Operation(
        "receiveWebhook", "notifications", "what another system says becomes a notification",
        {202: Answer("it is kept, and on its way", Sent)},
        (
            Parameter("X-Timestamp", "unix seconds, at most 300 s off", {"type": "string"}, "header"),
            Parameter("X-Signature-256", "`sha256=` and HMAC of `<timestamp>.<body>`", {"type": "string"}, "header"),
        ),
        {JSON: {}},
        errors={
            401: "the signature is missing, stale or wrong", 404: "no such webhook is configured",
            409: "it was taken in before",
        },
    ),
    "GET /ws/jobs": Operation(
        "websocket", "reading", "a WebSocket",
        {101: Answer("see asyncapi.json", headers=(("Sec-WebSocket-Accept", "see RFC 6455"),))},
        errors={426: "this is no WebSocket handshake, or not of version 13"},
    ),
}  # fmt: skip
