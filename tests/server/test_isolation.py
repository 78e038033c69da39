"""What is another user's cannot be read, counted, inferred or cancelled: it looks like what does not exist.

One table of probes: each is made twice, about what is alice's and about what nobody has, and both answers must be the
same byte for byte. The names are of equal length, so that lengths can be compared, too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import trio

from server.config import Limits
from server.routes import ROUTES, page
from tests.redis_servers import RedisServer
from tests.streams import WebSocket, session, stream_at, websocket
from tests.support import ADMIN, AUTH, WORKER, Answer, InProcess, bearer, server, token, until

JOBS = "/api/v2/jobs"
TASKS = "/api/brand-monitor/progress"
REPORTS = "/api/projects"
SECRETS = ("payroll", "confidential", "4711")


class Names(NamedTuple):
    """What a probe is about."""

    job: str
    ended: str
    task: str
    project: str
    user: str
    client: str


HERS = Names("secret-1", "secret-2", "secret-3", "secret-4", "alice", "")
NOBODYS = Names("absent-1", "absent-2", "absent-3", "absent-4", "nobod", "")

PLAIN = bearer("bob")
# To publish, to notify or to read something else of hers gives no other sight.
PUBLISHER = bearer("bob", capabilities=["publish", "notify"])
DELEGATE = bearer("bob", jobs=["secret-1x", "secretary-*"])


class Probe(NamedTuple):
    """One request; ``{job}`` and the like in target, body and headers are the fields of ``Names``."""

    method: str
    target: str
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012 - read only
    who: tuple[dict[str, str], ...] = (PLAIN, PUBLISHER, DELEGATE)
    status: int | None = None


PROBES = [
    # the record
    Probe("GET", f"{JOBS}/{{job}}", status=404),
    Probe("HEAD", f"{JOBS}/{{job}}", status=404),
    Probe("GET", f"{JOBS}/{{ended}}", status=404),
    Probe("GET", f"{JOBS}/{{job}}?fields=status", status=404),
    Probe("GET", f"{JOBS}/{{job}}?fields=", status=404),
    Probe("GET", f"{JOBS}/{{job}}", headers={"If-None-Match": "*"}, status=404),
    Probe("GET", f"{JOBS}/{{job}}", headers={"If-None-Match": "ETAG"}, status=404),
    Probe("HEAD", f"{JOBS}/{{job}}", headers={"If-None-Match": "ETAG"}, status=404),
    # its history
    Probe("GET", f"{JOBS}/{{job}}/history", status=404),
    Probe("GET", f"{JOBS}/{{ended}}/history?types=job_failed", status=404),
    # lists and counts
    Probe("GET", f"{JOBS}?userId={{user}}", status=403),
    Probe("GET", f"{JOBS}?userId={{user}}&status=failed&limit=1", status=403),
    Probe("GET", f"{JOBS}?all=1&kind=payroll"),
    # polls: whether it is there, has changed, has ended
    Probe("GET", f"{JOBS}/poll?timeout=0&jobIds={{job}}", status=200),
    Probe("GET", f"{JOBS}/poll?timeout=0&jobIds={{ended}}", status=200),
    Probe("GET", f"{JOBS}/poll?timeout=0&jobIds={{job}},{{ended}}&last_seen=CURSOR", status=200),
    Probe("GET", f"{JOBS}/poll?timeout=0&jobIds={{ended}}&last_seen=1", status=200),
    Probe("GET", f"{JOBS}/poll?timeout=0&jobIds={{job}}&client_id=hers", status=200),
    Probe("GET", f"{JOBS}/poll?timeout=0&userId={{user}}", status=403),
    Probe("GET", f"{JOBS}/poll?timeout=0&jobIds={{job}}&types=job_failed,job_deleted", status=200),
    # streams that are refused
    Probe("GET", f"{JOBS}/stream?userId={{user}}", status=403),
    Probe("GET", "/api/sse?userId={user}", status=403),
    Probe("GET", "/api/sse?channels=presence:user:{user}", status=403),
    Probe("GET", "/api/sse?channels=presence:presence:user:{user}", status=403),
    # cancelling and changing
    Probe("POST", f"{JOBS}/{{job}}/cancel", {}, status=404),
    Probe("POST", f"{JOBS}/{{ended}}/cancel", {}, status=404),
    Probe("POST", f"{JOBS}/{{job}}/updates", {"progress": 99}, who=(PLAIN, DELEGATE), status=403),
    Probe("POST", JOBS, {"jobId": "{job}", "userId": "bob"}, who=(PLAIN, DELEGATE), status=403),
    Probe("POST", "/api/v2/updates", [{"jobId": "{job}", "progress": 1}], who=(PLAIN, DELEGATE), status=403),
    Probe("DELETE", f"{JOBS}/{{job}}", who=(PLAIN, DELEGATE), status=403),
    # as a part of it, by those who may publish
    Probe("POST", JOBS, {"jobId": "part", "parentId": "{job}"}, who=(PUBLISHER,), status=404),
    Probe("POST", f"{JOBS}/part/updates", {"userId": "bob", "parentId": "{job}"}, who=(PUBLISHER,), status=404),
    Probe("POST", "/api/v2/updates", [{"jobId": "part", "userId": "bob", "parentId": "{job}"}], who=(PUBLISHER,)),
    # tasks
    Probe("HEAD", f"{TASKS}/{{task}}", status=404),
    Probe("HEAD", f"{TASKS}/{{job}}", status=404),
    Probe("PATCH", f"{TASKS}/{{task}}", {"progress": 1}, who=(PLAIN, DELEGATE), status=403),
    Probe("POST", f"{TASKS}/{{task}}/complete", {}, who=(PLAIN, DELEGATE), status=403),
    # reports
    Probe("GET", f"{REPORTS}/{{project}}/initial-report-status", status=404),
    Probe("HEAD", f"{REPORTS}/{{project}}/initial-report-status", status=404),
    Probe("GET", f"{REPORTS}/{{project}}/initial-report-status/stream", status=404),
    Probe("POST", f"{REPORTS}/{{project}}/initial-report-status", {}, who=(PLAIN, DELEGATE), status=403),
    Probe("PUT", f"{REPORTS}/{{project}}", {}, who=(PLAIN, DELEGATE), status=403),
    # who is there
    Probe("GET", "/api/sse/users/{user}", status=403),
    Probe("DELETE", "/api/sse/users/{user}", status=403),
    Probe("GET", "/api/sse/clients/{client}"),
    Probe("DELETE", "/api/sse/clients/{client}", status=403),
    Probe("GET", "/api/sse/connections", status=403),
    Probe("POST", "/api/sse/message", {"target": "user", "targetId": "{user}", "event": "x"}, who=(PLAIN, DELEGATE)),
    # numbers over all
    Probe("GET", "/api/v2/stats", status=403),
    Probe("GET", "/metrics", status=403),
    Probe("GET", "/api/brand-monitor/health", status=200),
    Probe("GET", "/openapi.json", status=200),
    Probe("GET", "/asyncapi.json", status=200),
    Probe("GET", "/api/v2/me", status=200),
    Probe("GET", "/health", status=200),
    Probe("GET", "/ready", status=200),
]


@pytest.fixture(scope="module")
def redis_url(shared_redis: RedisServer) -> str:
    with shared_redis.oracle() as oracle:
        oracle.flushall()
    return shared_redis.url


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "redis":
        return "memory:" if request.param == "memory" else f"sqlite:{tmp_path}/store.db"
    # A database for each test: the server shares what is in it with all others.
    numbers = request.getfixturevalue("redis_url"), next(_DATABASES)
    return "{}/{}".format(*numbers)


_DATABASES = iter(range(16))


@asynccontextmanager
async def with_secrets(store: str, **tables: Any) -> AsyncIterator[tuple[InProcess, Names, Names, dict[str, str]]]:
    """A server where alice has something of everything, and is connected."""
    async with server(auth=AUTH, store={"url": store}, **tables) as at, AsyncExitStack() as stack:
        first = (await at.publish("first", WORKER, userId="carol")).json["id"]
        await at.publish("secret-1", WORKER, userId="alice", kind="payroll", message="confidential", progress=47)
        await at.publish("secret-1", WORKER, status="processing", stage="4711")
        await at.publish("secret-2", WORKER, userId="alice", status="failed", error="confidential")
        task = {"userId": "alice", "message": "confidential"}
        assert (await at.post(f"{TASKS}/secret-3", task, WORKER)).status == 201
        assert (await at.ask("PUT", f"{REPORTS}/secret-4", {"userId": "alice"}, WORKER)).status == 201
        report = await at.post(f"{REPORTS}/secret-4/initial-report-status", {"phase": "analysis"}, WORKER)
        assert report.status == 200, report
        note = {"target": "user", "targetId": "alice", "event": "payroll", "data": "confidential", "store": True}
        assert (await at.post("/api/sse/message", note, ADMIN)).status == 200
        ws = await stack.enter_async_context(websocket(at, token=token("alice")))
        client = (await ws.receive())["clientId"]
        polled = await at.get(f"{JOBS}/poll?timeout=0&client_id=hers&jobIds=secret-1", bearer("alice"))
        assert polled.json["updates"]
        tag = (await at.get(f"{JOBS}/secret-1", bearer("alice"))).headers["etag"]
        absent = client[:-1] + ("0" if client[-1] != "0" else "1")
        texts = {"ETAG": tag, "CURSOR": first}
        yield at, HERS._replace(client=client), NOBODYS._replace(client=absent), texts


def filled(value: Any, names: Names, texts: dict[str, str]) -> Any:
    """The same with the names put in."""
    if isinstance(value, dict):
        return {key: filled(one, names, texts) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, names, texts) for one in value]
    if isinstance(value, str):
        for name, text in names._asdict().items():
            value = value.replace(f"{{{name}}}", text)
        for name, text in texts.items():
            value = value.replace(name, text)
    return value


def comparable(answer: Answer, names: Names) -> tuple[int, dict[str, str], str]:
    """All of an answer but what differs each time, with the names taken out."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
    text = answer.body.decode()
    request_id = answer.headers["x-request-id"]
    text = text.replace(request_id, "REQUEST")
    for name, value in names._asdict().items():
        text = text.replace(value, name)
    return answer.status, headers, re.sub(r'"(timestamp|uptime[A-Za-z]*)":("[^"]*"|[0-9.]+)', "", text)


async def test_what_is_another_users_looks_like_what_is_not_there(store: str) -> None:
    async with with_secrets(store) as (at, hers, nobodys, texts):
        before = await jobs_of(at, "alice")
        for probe in PROBES:
            for who in probe.who:
                answers = []
                for names in (hers, nobodys):
                    target, body, headers = (filled(one, names, texts) for one in probe[1:4])
                    answer = await at.ask(probe.method, target, body, {**who, **headers})
                    answers.append(comparable(answer, names))
                    if probe.status is not None:
                        assert answer.status == probe.status, (probe, answer)
                    said = answer.body.decode() + str(answer.headers)
                    if "openapi" not in target and "asyncapi" not in target:
                        assert not any(secret in said for secret in SECRETS), (probe, answer)
                assert answers[0] == answers[1], probe
        assert await jobs_of(at, "alice") == before, "none of it has changed anything"


async def jobs_of(at: InProcess, user: str) -> Any:
    answer = await at.get(JOBS, bearer(user))
    assert answer.status == 200
    return answer.json["jobs"]


def test_every_route_is_probed() -> None:
    """A route that is added needs a probe, or a reason to be none."""
    none = {
        "/": "the page",
        "/ws/jobs": "below",
        "/api/v2/jobs/stream": "below",
        "/api/sse": "below",
        "/api/sse/ack": "below",
        "/api/webhooks/{name}": "signed by who sends it; names no job",
        "/ws/echo": "returns what it is sent",
    }
    tried = [(probe.method, re.sub(r"\{[a-z]+\}", "x", probe.target.partition("?")[0])) for probe in PROBES]
    for path, methods in ROUTES.items():
        shape = re.compile(re.sub(r"\{[^}]+\}", "[^/]+", path))
        for method, route in methods.items():
            if path in none or (method, path) in NOT_PROBED or route.handler is page.file:
                continue
            assert any(method == one and shape.fullmatch(target) for one, target in tried), (method, path)


def test_what_the_threat_model_names_is_there() -> None:
    root = Path(__file__).parents[2]
    text = (root / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[a-z_/]+\.py)`|\]\(([^)]+)\)", text)
    assert len(named) > 5
    for test, link in named:
        assert (root / (test or link)).is_file(), test or link
    for key in re.findall(r"`limits\.([a-z_]+)`", text):
        assert hasattr(Limits(), key), key


# The publisher's side of these is in the table already, under the same paths.
NOT_PROBED = {
    ("GET", "/api/{app}/progress/{taskId}"),  # a stream, below
    ("POST", "/api/{app}/progress/{taskId}"),
    ("POST", "/api/{app}/progress/{taskId}/fail"),
    ("GET", "/api/projects/{projectId}/initial-report-status/stream"),
}


# Live readers: whatever happens to what is hers, he hears what he would hear of nothing.

STREAMS = (
    f"{JOBS}/stream?jobIds={{job}}",
    f"{JOBS}/stream?jobIds={{ended}}",
    f"{JOBS}/stream?jobIds={{ended}}&last_seen=CURSOR",  # 204 to its owner
    f"{JOBS}/stream?jobIds={{job}},{{ended}}&last_seen=CURSOR",
    f"{JOBS}/stream?jobIds={{job}}&types=job_deleted,job_failed",
    f"{TASKS}/{{task}}",
)
MARK = "mark-1"


async def test_streams_of_what_is_another_users_stay_silent(store: str) -> None:
    async with with_secrets(store, server={"heartbeat": 0.3}) as (at, hers, nobodys, texts), AsyncExitStack() as stack:
        opened = []
        for names in (hers, nobodys):
            for target in STREAMS:
                at_target = filled(target, names, texts)
                stream = await stack.enter_async_context(stream_at(at, at_target, headers=PLAIN))
                opened.append((names, target, stream))
            everything = await stack.enter_async_context(session(at, token=token("bob")))
            answer = await everything.subscribe(jobIds=[names.job, names.ended, names.task], last_seen=texts["CURSOR"])
            assert (answer["snapshot"], answer["denied"]) == ([], [])
            await everything.send("get", jobIds=[names.job, names.ended])
            assert (await everything.receive())["jobs"] == []
            opened.append((names, "websocket", everything))
        own = await stack.enter_async_context(session(at, token=token("bob")))
        await own.subscribe()
        # All that can happen to a job.
        await at.publish("secret-1", WORKER, progress=90, message="confidential")
        assert (await at.post(f"{JOBS}/secret-1/cancel", {}, bearer("alice"))).status == 202
        await at.publish("secret-1", WORKER, status="completed", result={"payroll": 4711})
        assert (await at.ask("DELETE", f"{JOBS}/secret-2", headers=WORKER)).status == 204
        assert (await at.post(f"{TASKS}/secret-3/complete", {"results": 4711}, WORKER)).status == 200
        await at.publish(MARK, WORKER, userId="bob")
        # His own comes alone, and what was before it has been given to everybody by then.
        while (message := await own.receive())["type"] == "heartbeat":
            pass
        assert message["jobId"] == MARK
        assert await until_heartbeat(own) == ["heartbeat"]
        heard: dict[Names, list[Any]] = {hers: [], nobodys: []}
        for names, target, reader in opened:
            if isinstance(reader, WebSocket):
                found = [await until_heartbeat(reader)]
            else:
                assert reader.status == 200, (target, reader.headers)
                first = await reader.until("heartbeat")
                last = await reader.until("heartbeat")  # the first may have come before all that
                kinds = [event.type for event in (*first, *last)]
                found = [
                    (name, value) for name, value in reader.headers.items() if name not in ("date", "x-request-id")
                ]
                found += list(dict.fromkeys(kinds))
                text = str([event.data for event in (*first, *last)])
                assert not any(secret in text for secret in SECRETS), text
            heard[names].append((target, found))
        assert heard[hers] == heard[nobodys]


async def until_heartbeat(ws: WebSocket) -> list[str]:
    found = []
    for _ in range(2):
        while True:
            kind = (await ws.receive())["type"]
            found.append(kind)
            if kind == "heartbeat":
                break
    return list(dict.fromkeys(found))


async def test_polls_that_wait_are_not_woken_by_what_is_another_users(store: str) -> None:
    async with with_secrets(store) as (at, _, _, _), trio.open_nursery() as nursery:
        answers: dict[str, Answer] = {}

        async def wait(query: str) -> None:
            answers[query] = await at.get(f"{JOBS}/poll?timeout=30&last_seen={now}&{query}", PLAIN)

        now = (await at.get(JOBS, PLAIN)).json["id"]
        queries = ("jobIds=secret-1,mark-1", "jobIds=absent-1,mark-1", "kind=payroll,mark", "")
        for query in queries:
            nursery.start_soon(wait, query)
        await until(lambda: len(at.node.polls) == len(queries))
        await at.publish("secret-1", WORKER, status="failed")
        assert answers == {}
        await at.publish(MARK, WORKER, userId="bob", kind="mark")
        await until(lambda: len(answers) == len(queries))
        for query, answer in answers.items():
            assert [update["jobId"] for update in answer.json["updates"]] == [MARK], query


WEBSOCKET_PROBES = [
    {"type": "subscribe", "userId": "{user}"},
    {"type": "subscribe", "all": True},
    {"type": "subscribe", "jobIds": ["{job}", "{ended}"]},
    {"type": "subscribe", "jobIds": ["{job}"], "last_seen": "CURSOR"},
    {"type": "subscribe", "jobIds": ["{ended}"], "last_seen": "1"},
    {"type": "subscribe", "kind": "payroll"},
    {"type": "get", "jobIds": ["{job}", "{ended}", "{task}", "report:{project}"]},
    {"type": "unsubscribe", "jobIds": ["{job}"]},
    {"type": "publish", "updates": [{"jobId": "{job}", "progress": 99}]},
    {"type": "publish", "updates": [{"jobId": "part", "userId": "bob", "parentId": "{job}"}]},
    {"type": "ack", "id": "CURSOR"},
    {"type": "subscribe", "channels": ["presence:user:{user}", "presence:presence:user:{user}"]},
    {"type": "notification", "target": "user", "targetId": "{user}", "event": "x", "data": 1},
    {"type": "notification", "target": "client", "targetId": "{client}", "event": "x", "data": 1},
]


async def test_a_websocket_tells_no_more(store: str) -> None:
    async with with_secrets(store) as (at, hers, nobodys, texts):
        for message in WEBSOCKET_PROBES:
            for who in ({}, {"jobs": ["secretary-*"]}):
                said = []
                for names in (hers, nobodys):
                    async with session(at, token=token("bob", **who)) as ws:
                        fields = {key: value for key, value in filled(message, names, texts).items() if key != "type"}
                        await ws.send(message["type"], **fields)
                        await ws.send("ping", ref="end")
                        answers: list[dict[str, Any]] = []
                        while not answers or answers[-1].get("ref") != "end":
                            answers.append(await ws.receive())
                        text = str(answers)
                        assert not any(secret in text for secret in SECRETS), text
                        for name, value in names._asdict().items():
                            text = text.replace(value, name)
                        said.append(re.sub(r"'timestamp': '[^']*'", "", text))
                assert said[0] == said[1], message


async def test_an_id_that_was_used_before_says_nothing_of_that(store: str) -> None:
    async with with_secrets(store) as (at, _, _, texts):
        assert (await at.ask("DELETE", f"{JOBS}/secret-1", headers=WORKER)).status == 204
        await at.publish("secret-1", WORKER, userId="bob", message="his own")
        history = (await at.get(f"{JOBS}/secret-1/history", PLAIN)).json["updates"]
        assert [update["version"] for update in history] == [1]
        polled = (await at.get(f"{JOBS}/poll?timeout=0&jobIds=secret-1&last_seen={texts['CURSOR']}", PLAIN)).json
        assert [(update["type"], update["userId"]) for update in polled["updates"]] == [("status_update", "bob")]
        gone = (
            await at.get(f"{JOBS}/poll?timeout=0&jobIds=secret-1&last_seen={texts['CURSOR']}", bearer("alice"))
        ).json
        assert {update["userId"] for update in gone["updates"]} == {"alice"}
        assert gone["updates"][-1]["type"] == "job_deleted"


async def test_idempotency_keys_are_each_publishers_own(store: str) -> None:
    async with with_secrets(store) as (at, _, _, _):
        key = {"Idempotency-Key": "the-same"}
        body = {"jobId": "keyed-1", "userId": "alice"}
        assert (await at.post(JOBS, body, WORKER | key)).status == 201
        for other in (body, {"jobId": "keyed-2", "userId": "bob"}):
            answer = await at.post(JOBS, other, PUBLISHER | key)
            assert "duplicate" not in answer.json, answer
            assert answer.status == (409 if other is body else 201)


async def test_a_clients_name_is_its_users_own(store: str) -> None:
    """``with_secrets`` has polled as ``hers``: whoever takes that name begins from the snapshot all the same."""
    async with with_secrets(store) as (at, _, _, _):
        await at.publish(MARK, WORKER, userId="bob")
        polled = (await at.get(f"{JOBS}/poll?timeout=0&client_id=hers", PLAIN)).json
        assert [update["jobId"] for update in polled["updates"]] == [MARK]


async def test_acknowledging_takes_nothing_from_others(store: str) -> None:
    async with with_secrets(store) as (at, _, _, _):
        last = (await at.get(JOBS, ADMIN)).json["id"]
        assert (await at.post("/api/sse/ack", {"id": last}, PLAIN)).status < 300
        async with stream_at(at, "/api/sse", headers=bearer("alice")) as stream:
            events = [await stream.event(), await stream.event()]
        assert [event.name for event in events] == ["connected", "payroll"]
        async with stream_at(at, "/api/sse?channels=payroll", headers=PLAIN) as stream:
            assert (await stream.event()).name == "connected"
            assert stream._events == []


async def test_lists_and_snapshots_have_nothing_of_others_in_them(store: str) -> None:
    async with with_secrets(store) as (at, _, _, _):
        await at.publish(MARK, WORKER, userId="bob")
        listed = (await at.get(f"{JOBS}?limit=1", PLAIN)).json
        assert ([job["jobId"] for job in listed["jobs"]], listed["next"]) == ([MARK], None)
        assert [job["jobId"] for job in (await at.get(f"{JOBS}/poll?timeout=0", PLAIN)).json["updates"]] == [MARK]
        async with session(at, token=token("bob")) as ws:
            assert [job["jobId"] for job in (await ws.subscribe())["snapshot"]] == [MARK]
        async with stream_at(at, f"{JOBS}/stream", headers=PLAIN) as stream:
            snapshot = (await stream.until("snapshot"))[-1]
            assert [job["jobId"] for job in snapshot.data["jobs"]] == [MARK]


async def test_both_take_the_same_way_through_the_server() -> None:
    """Time cannot tell what does not differ: the lines that are run for a foreign record and for none."""
    async with with_secrets("memory:") as (at, hers, nobodys, texts):
        for number in range(300):  # how much there is of hers must not show either
            await at.publish("secret-1", WORKER, stage=f"{number}")
        for target in (
            f"{JOBS}/{{job}}",
            f"{JOBS}/{{job}}/history",
            f"{JOBS}/poll?timeout=0&jobIds={{job}}",
            f"{JOBS}/poll?timeout=0&jobIds={{job}}&last_seen=CURSOR",
            f"{JOBS}?kind=payroll",
        ):
            counts = []
            for names in (hers, nobodys):
                async with at.connect() as http:
                    for _ in range(3):  # what is remembered is remembered
                        await http.request("GET", filled(target, names, texts), headers=PLAIN)
                    with counted_lines() as count:
                        await http.request("GET", filled(target, names, texts), headers=PLAIN)
                    counts.append(count[0])
            assert counts[0] > 100
            # Whose it is has to be looked at: a comparison or two.
            assert abs(counts[0] - counts[1]) <= 16, (target, counts)


class counted_lines:
    """Lines of this project's own that are run meanwhile, in this thread."""

    ROOT = str(Path(__file__).parents[2])

    def __enter__(self) -> list[int]:
        self.count = [0]
        sys.settrace(self._call)
        # Tasks that wait already have their frames: they are looked at when they go on.
        return self.count

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith((f"{self.ROOT}/server", f"{self.ROOT}/protocol")):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.count[0] += 1
        return self._line

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
