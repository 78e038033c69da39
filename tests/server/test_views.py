"""What all views share: found by looking, routed by their data, one encoding for each wire form."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import protocol.views
from protocol import job as rules
from protocol.update import Job, Update
from protocol.view import Call, View, read_update, target_of
from protocol.views import all_views
from protocol.wire import Framing, WireForm
from server import routes
from server.app import drain
from tests.streams import clean_server, cursor, event_stream, lose_log, parse_events, put, session, stream_at
from tests.support import AUTH, ROOT, WORKER, Address, bearer, spawned

# All it takes to add a view, as users are told.
(RENDERS,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "views.md").read_text(), re.DOTALL | re.MULTILINE)


async def use_renders(at: Address) -> None:
    """Every call of the added view, as its users make it."""
    worker, alice = WORKER, bearer("alice")
    path = "/studio/film1"
    assert (await at.get(path, alice)).error == "render_not_found"
    created = await at.post(path, {"userId": "alice", "percent": 5}, worker)
    assert (created.status, created.json["render"]["state"]) == (201, "waiting")
    assert (await at.get(path, alice)).json == {"renderId": "film1", "state": "waiting", "percent": 5}
    async with stream_at(at, f"{path}/frames", headers=alice) as stream:
        hello, frame = await stream.events(2)
        assert (hello.name, hello.data["renderId"]) == ("hello", "film1")
        assert (frame.name, frame.data["percent"], frame.id) == ("frame", 5, created.json["id"])
        assert (await at.ask("PATCH", path, {"percent": 50, "state": "processing"}, worker)).status == 200
        assert (await stream.event()).data == {"renderId": "film1", "state": "rendering", "percent": 50}
        head = await at.ask("HEAD", path, headers=alice | {"Origin": "https://app.example"})
        assert (head.headers["x-render-state"], head.headers["x-render-percent"]) == ("rendering", "50")
        assert "x-render-state" in head.headers["access-control-expose-headers"]
        wrong = await at.ask("PATCH", path, {"percent": "much"}, worker)
        assert (wrong.status, wrong.json["error"]["field"]) == (422, "percent")
        assert (await at.ask("PATCH", path, {}, alice)).status == 403
        assert (await at.ask("DELETE", path, headers=worker)).headers["allow"] == "GET, HEAD, POST, PATCH, OPTIONS"
        assert (await at.ask("POST", f"{path}/done", headers=worker)).status == 200
        (last,) = await stream.rest()
        assert last.data == {"renderId": "film1", "state": "completed", "percent": 100}
    assert (await at.get(f"{path}/frames", alice | {"Last-Event-ID": str(last.id)})).status == 204


async def test_a_view_is_added_by_adding_one_module(tmp_path: Path) -> None:
    """The sources as they are, and one file more: run from there."""
    without_caches = shutil.ignore_patterns("__pycache__")
    for package in ("protocol", "server"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=without_caches)
    (tmp_path / "protocol" / "views" / "renders.py").write_text(RENDERS, encoding="utf-8")
    async with spawned(
        tmp_path, sources=tmp_path, auth=AUTH, cors={"origins": ["https://app.example"]}, store={"url": "memory:"}
    ) as at:
        await use_renders(at)


@pytest.fixture
def renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[View]:
    """The same within this process."""
    (tmp_path / "renders.py").write_text(RENDERS, encoding="utf-8")
    monkeypatch.setattr(protocol.views, "__path__", [*protocol.views.__path__, str(tmp_path)])
    monkeypatch.setattr(routes, "ROUTES", {path: dict(methods) for path, methods in routes.ROUTES.items()})
    all_views.cache_clear()
    view = all_views()["renders"]
    routes.add_view(view)
    monkeypatch.setattr(routes, "_TEMPLATES", routes._templates())
    yield view
    all_views.cache_clear()
    del sys.modules["protocol.views.renders"]


@pytest.mark.parametrize("ends", [False, True], ids=["progress", "the end"])
async def test_one_update_through_five_views_is_merged_once_and_encoded_once_for_each(
    renders: View, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Jobs over SSE and WebSocket, tasks, reports and one more; each with readers who came by different channels."""
    encoded: Counter[str] = Counter()
    merged: list[str] = []
    updates, apply = WireForm.updates, rules.apply

    def counting(form: WireForm, batch: Sequence[Update], epoch: str) -> bytes:
        encoded[f"{form.view.name} {form.framing.value}"] += len(batch)
        return updates(form, batch, epoch)

    def counting_apply(job: Job, *args: Any, **kwargs: Any) -> Job:
        merged.append(job.latest.job_id)
        return apply(job, *args, **kwargs)

    alice, admin = bearer("alice"), bearer("root", admin=True)
    async with clean_server(auth=AUTH) as at, AsyncExitStack() as stack:
        assert (await at.ask("PUT", "/api/projects/p1", {"userId": "alice"}, WORKER)).status == 201
        streams = []
        for headers in (alice, alice, admin):
            for target in (
                "/api/v2/jobs/stream?jobIds=report:p1",
                "/api/v2/jobs/stream?userId=alice",
                "/api/initial-report/progress/report:p1",
                "/api/projects/p1/initial-report-status/stream",
                "/studio/report:p1/frames",
            ):
                stream = await stack.enter_async_context(stream_at(at, target, headers=headers))
                await stream.events(2)
                streams.append(stream)
        sockets = []
        for headers in (alice, alice, admin):
            ws = await stack.enter_async_context(session(at, headers=headers))
            await ws.subscribe(jobIds=["report:p1"])
            sockets.append(ws)
        monkeypatch.setattr(WireForm, "updates", counting)
        monkeypatch.setattr(rules, "apply", counting_apply)
        fields = {"phase": "completed"} if ends else {"phase": "analysis"}
        answer = await at.post("/api/projects/p1/initial-report-status", fields, WORKER)
        assert answer.status == 200
        for stream in streams:
            assert (await stream.event()).id == answer.json["id"]
        for ws in sockets:
            assert (await ws.receive())["id"] == answer.json["id"]
        assert merged == ["report:p1"]
        assert encoded == {
            "jobs sse-chunked": 1,
            "jobs websocket": 1,
            "tasks sse-chunked": 1,
            "reports sse-chunked": 1,
            "renders sse-chunked": 1,
        }


async def test_what_has_paths_of_its_own_is_no_app() -> None:
    async with clean_server() as at:
        for target in ("/api/v2/progress/t", "/api/v2/health", "/api/projects/progress/t"):
            answer = await at.get(target)
            assert (answer.status, answer.error) == (404, "not_found"), target
        answer = await at.get("/api/projects/health")  # a project, which is registered by PUT
        assert (answer.status, answer.headers["allow"]) == (405, "PUT, OPTIONS")
        # A literal segment wins over a variable, whatever the variable could be.
        await at.ask("PUT", "/api/projects/progress", {})
        report = await at.get("/api/projects/progress/initial-report-status")
        assert report.json["projectId"] == "progress"
        # Apps and tasks may have any name beside these.
        assert (await at.post("/api/progress/progress/complete", {})).status == 201
        assert (await at.post("/api/progress/progress/complete/complete", {})).status == 200
        assert (await at.get("/api/health/health")).json["status"] == "healthy"
        for target in ("/api/../health", "/api/./health", "/api//health"):
            assert (await at.get(target)).status == 404, target


async def test_a_server_that_goes_away_says_so_in_the_views_words() -> None:
    async with clean_server() as at:
        await at.ask("PUT", "/api/projects/p", {})
        await at.post("/api/app/progress/t", {})
        async with (
            stream_at(at, "/api/app/progress/t") as task,
            stream_at(at, "/api/projects/p/initial-report-status/stream") as report,
        ):
            await task.events(2)
            await report.events(2)
            await drain(at.node, 0)
            for stream, name, member, shown in ((task, None, "taskId", "t"), (report, "error", "projectId", "p")):
                (error,) = await stream.rest()
                assert (error.type, error.name, error.data[member]) == ("error", name, shown)
                assert error.data["code"] == "try_later"
                assert error.retry is not None
                assert error.id == cursor(at)
        (later,) = parse_events((await at.get("/api/app/progress/t", {"Accept": "text/event-stream"})).body)
        assert (later.data["taskId"], later.data["code"]) == ("t", "try_later")


async def test_a_lost_log_is_made_up_for_by_the_state() -> None:
    async with clean_server() as at:
        await at.post("/api/app/progress/t", {"stage": "one"})
        async with stream_at(at, "/api/app/progress/t") as task, stream_at(at, "/api/app/progress/none") as none:
            await task.events(2)
            await none.event()
            lose_log(at, at.node.history.last)
            state = await task.event()
            assert (state.data["progress"]["stage"], state.id) == ("one", cursor(at))
            unknown = await none.event()
            assert (unknown.type, unknown.data["code"], unknown.id) == ("error", "lost", None)
            put(at, "none", kind="app", stage="made again")
            assert (await none.event()).data["progress"]["stage"] == "made again"


async def test_preflights_of_every_path_of_a_view() -> None:
    page = "https://app.example"
    async with clean_server(auth=AUTH, cors={"origins": [page]}) as at:
        for view in all_views().values():
            for call in view.calls:
                path = re.sub(r"\{\w+\}", "x", call.path)
                asked = {"Origin": page, "Access-Control-Request-Method": call.method}
                answer = await at.ask("OPTIONS", path, headers=asked)
                assert answer.status == 204, path
                assert call.method in answer.headers["access-control-allow-methods"].split(", ")
                assert call.method in answer.headers["allow"].split(", ")


async def test_filters_of_jobs_are_no_parameters_of_views() -> None:
    async with clean_server() as at:
        await at.post("/api/app/progress/t", {"status": "running"})
        async with stream_at(at, "/api/app/progress/t?types=job_failed&fields=stage&jobIds=x") as stream:
            assert (await stream.events(2))[1].data["progress"]["status"] == "running"


async def test_a_view_and_jobs_see_the_same_update(renders: View) -> None:
    async with clean_server() as at:
        await at.post("/studio/film1", {"percent": 3})
        async with event_stream(at) as jobs, stream_at(at, "/studio/film1/frames") as frames:
            await jobs.until("snapshot")
            await frames.events(2)
            await at.publish("film1", progress=70)
            update, frame = await jobs.event(), await frames.event()
            assert (update.id, update.data["progress"]) == (frame.id, frame.data["percent"])


def test_two_views_cannot_have_one_name_or_one_path(
    renders: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"view 'renders': GET /studio/\{renderId\} is taken"):
        routes.add_view(renders)
    (tmp_path / "zzz.py").write_text(RENDERS, encoding="utf-8")
    all_views.cache_clear()
    with pytest.raises(ValueError, match=r"zzz\.py: there is a view 'renders' already"):
        all_views()
    monkeypatch.delitem(sys.modules, "protocol.views.zzz")


@pytest.mark.parametrize("framing", list(Framing))
def test_every_framing_carries_a_view(framing: Framing) -> None:
    """Event streams alone have one now, but a wire form is complete."""
    tasks = all_views()["tasks"]
    target = target_of(tasks, {"app": "a", "taskId": "t"})
    fields = read_update(tasks, target, {}, b'{"status":"failed","error":"no"}')
    one = rules.create(fields, job_id="t", user_id="u", offset=7, now_ms=1).latest
    form = WireForm(framing, None, tasks, "a")
    assert form.updates([one], "e") == form.update(one, "e:7")
    text = form.updates([one, one], "e")
    assert text.count(b'"type":"progress"') == text.count(b'"type":"error"') == 2
    assert WireForm(framing, None, tasks, "b").updates([one], "e") == b""
    if framing is Framing.SSE:
        assert form.update(one, "e:5").startswith(b"id: e:5\ndata: ")  # held back: behind neither
        assert form.update(one, "e:7").count(b"id: e:6\n") == form.update(one, "e:7").count(b"id: e:7\n") == 1


def test_calls_name_what_they_do() -> None:
    for view in all_views().values():
        assert {call.does for call in view.calls} <= set(routes.views._DOES), view.name
        for call in view.calls:
            assert isinstance(call, Call)
            assert call.does == "health" or f"{{{view.variable}}}" in call.path
