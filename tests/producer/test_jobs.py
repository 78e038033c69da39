"""Jobs reported by the package to a real server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from statuswire import (
    Client,
    Job,
    JobCancelled,
    Rejected,
    cancel_task,
    complete_task,
    create_task,
    fail_task,
    job,
    publish,
    track,
    update_task,
)
from tests.producer.workers import history, journals, record, settled, worker
from tests.support import AUTH, WORKER, bearer, server, token, until


async def test_a_job_from_its_begin_to_its_end(tmp_path: Path) -> None:
    async with server() as at, worker(at.url, tmp_path) as client:
        with job("a", user="u", kind="export", metadata={"format": "pdf"}, client=client) as j:
            j.progress(45, "page 120", stage="pages", current_operation="drawing", steps=(120, 300))
            await settled(client)
            seen = await record(at, "a")
            assert seen["status"] == "processing"
            assert seen["progress"] == 45
            assert (seen["message"], seen["stage"], seen["currentOperation"]) == ("page 120", "pages", "drawing")
            assert seen["steps"] == {"done": 120, "total": 300}
            assert (seen["kind"], seen["userId"], seen["metadata"]) == ("export", "u", {"format": "pdf"})
            j.complete({"url": "/files/1.pdf"}, "ready")
        await settled(client)
        seen = await record(at, "a")
        assert (seen["status"], seen["progress"], seen["message"]) == ("completed", 100, "ready")
        assert seen["result"] == {"url": "/files/1.pdf"}
        assert [path.read_bytes() for path in journals(tmp_path)] == [b""]
    assert journals(tmp_path) == []


async def test_progress_is_conflated_and_the_end_has_what_came_last() -> None:
    async with server() as at, worker(at.url, interval=3600) as client:
        with job("a", user="u", client=client) as j:
            await until(lambda: at.node.jobs.get("a"))
            for percent in range(100):
                j.progress(percent, stage=f"stage {percent}", metadata={"rows": percent})
        await settled(client)
        updates = await history(at, "a")
        assert len(updates) == 2
        assert (updates[1]["stage"], updates[1]["metadata"]) == ("stage 99", {"rows": 99})


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("no\n  such file"), "failed", "ValueError: no such file"),
        (KeyboardInterrupt(), "cancelled", "KeyboardInterrupt"),
        (SystemExit(3), "cancelled", "SystemExit"),
        (JobCancelled("by request"), "cancelled", None),
        (ExceptionGroup("two", [ValueError("x")]), "failed", "ExceptionGroup: two (1 sub-exception)"),
        (BaseExceptionGroup("two", [KeyboardInterrupt()]), "cancelled", "BaseExceptionGroup"),
    ],
)
async def test_what_leaves_the_block_ends_the_job_and_goes_on(
    error: BaseException, status: str, text: str | None
) -> None:
    async with server() as at, worker(at.url) as client:
        with pytest.raises(type(error)) as raised, job("a", user="u", client=client):
            raise error
        assert raised.value is error
        await settled(client)
        seen = await record(at, "a")
        assert (seen["status"], seen.get("error")) == (status, text)


async def test_the_first_end_counts() -> None:
    async with server() as at, worker(at.url) as client:
        with job("a", user="u", client=client) as j:
            j.fail("no rows", "nothing to do")
            j.complete()
            j.progress(99)
        await settled(client)
        seen = await record(at, "a")
        assert (seen["status"], seen["error"], seen["message"]) == ("failed", "no rows", "nothing to do")


async def test_a_cancel_request_is_seen_and_answered() -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        j = job("a", user="u", client=client)
        asking = job("b", user="u", raise_on_cancel=True, client=client)
        await settled(client)
        for name in "ab":
            assert (await at.post(f"/api/v2/jobs/{name}/cancel", {})).status == 202
        assert not j.cancel_requested

        def reports() -> bool:
            j.progress(10)
            return j.cancel_requested

        await until(reports)
        j.cancel("stopped by request")

        def until_cancelled() -> None:
            with asking:
                while True:
                    asking.progress(10)

        with pytest.raises(JobCancelled):
            await trio.to_thread.run_sync(until_cancelled)
        await settled(client)
        assert (await record(at, "a"))["status"] == "cancelled"
        assert (await record(at, "b"))["status"] == "cancelled"


async def test_parts_add_up_to_their_parent() -> None:
    async with server() as at, worker(at.url) as client:
        with job("book", user="u", auto_complete=True, client=client) as book:
            parts = [
                job(f"book-{n}", user="u", parent_id=book.id, weight=weight, client=client)
                for n, weight in ((1, 1), (2, 3))
            ]
            parts[0].complete()
            await settled(client)
            assert (await record(at, "book"))["progress"] == 25
            parts[1].complete()
        await settled(client)
        seen = await record(at, "book")
        assert (seen["status"], seen["steps"]) == ("completed", {"done": 2, "total": 2, "failed": 0})


async def test_another_attempt_of_the_same_job() -> None:
    async with server() as at, worker(at.url) as client:
        with pytest.raises(ValueError, match="once"), job("a", user="u", attempt=1, client=client):
            raise ValueError("once")
        with job("a", user="u", attempt=2, client=client) as j:
            j.progress(5)
        await settled(client)
        assert [(one["attempt"], one["status"]) for one in await history(at, "a")][-1] == (2, "completed")
        assert "error" not in await record(at, "a")


async def test_single_updates() -> None:
    async with server() as at, worker(at.url) as client:
        create_task("a", user="u", kind="import", client=client)
        await settled(client)
        assert (await record(at, "a"))["status"] == "queued"
        update_task("a", 30, "rows", stage="read", client=client)
        await settled(client)
        seen = await record(at, "a")
        assert (seen["status"], seen["progress"], seen["message"], seen["stage"]) == ("processing", 30, "rows", "read")
        complete_task("a", {"rows": 3}, client=client)
        fail_task("b", ValueError("x"), user="u", client=client)
        cancel_task("c", "not now", user="u", client=client)
        publish({"jobId": "d", "userId": "u", "stage": "one"}, {"jobId": "d", "stage": None}, client=client)
        publish({"jobId": "d", "status": "completed"}, client=client)
        await settled(client)
        assert (await record(at, "a"))["result"] == {"rows": 3}
        assert (await record(at, "b"))["error"] == "ValueError: x"
        assert (await record(at, "c"))["message"] == "not now"
        assert "stage" not in await record(at, "d")
        with pytest.raises(ValueError, match="jobId"):
            publish({"status": "completed"}, client=client)


async def test_an_iteration_is_a_job() -> None:
    async with server() as at, worker(at.url) as client:
        assert list(track([1, 2, 3], "a", user="u", client=client)) == [1, 2, 3]
        assert list(track(iter([1, 2]), "b", user="u", client=client)) == [1, 2]
        for item in track(range(10), "c", user="u", client=client):
            if item == 3:
                break

        def failing() -> Any:
            yield 1
            raise ValueError("no more")

        with pytest.raises(ValueError, match="no more"):
            list(track(failing(), "d", total=4, user="u", client=client))
        with job("e", user="u", client=client) as j:
            for item in j.track(range(10), stage="look"):
                if item == 5:
                    break
        await settled(client)
        seen = {name: await record(at, name) for name in "abcde"}
        assert (seen["a"]["status"], seen["a"]["steps"]) == ("completed", {"done": 3, "total": 3})
        assert (seen["b"]["status"], seen["b"]["steps"]) == ("completed", {"done": 2})
        assert (seen["c"]["status"], seen["c"]["message"]) == ("cancelled", "left after 3 of 10")
        assert (seen["d"]["status"], seen["d"]["error"]) == ("failed", "ValueError: no more")
        assert (seen["e"]["status"], seen["e"]["stage"]) == ("completed", "look")


async def test_iterating_reports_now_and_then() -> None:
    async with server() as at, worker(at.url) as client:
        list(track(range(100_000), "a", user="u", client=client))
        await settled(client)
        assert len(await history(at, "a")) < 20


async def test_a_lease_is_kept_while_the_handle_is_open() -> None:
    async with server() as at, worker(at.url) as client:
        kept = job("kept", user="u", ttl=1.2, client=client)
        given_up = job("given-up", user="u", ttl=1.2, renew=False, client=client)
        await until(lambda: status(at.node.jobs.get("given-up")) == "stalled")
        assert status(at.node.jobs.get("kept")) == "processing"
        given_up.progress(50)
        await settled(client)
        assert (await record(at, "given-up"))["status"] == "processing"
        del kept  # nobody has it any more: what it reported on shows as stalled
        await until(lambda: status(at.node.jobs.get("kept")) == "stalled")
        given_up.cancel()


def status(found: Any) -> str | None:
    return None if found is None else found.latest.status


async def test_many_threads_use_one_client(tmp_path: Path) -> None:
    async with server() as at, worker(at.url, tmp_path) as client:

        def work(number: int) -> None:
            for part in range(10):
                with job(f"{number}-{part}", user="u", client=client) as j:
                    for percent in range(0, 100, 10):
                        j.progress(percent)
                shared.progress(number)

        def all_of_them() -> None:
            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        with job("shared", user="u", client=client) as shared:
            await trio.to_thread.run_sync(all_of_them)
        await settled(client)
        listed = (await at.get("/api/v2/jobs?status=completed&limit=1000")).json["jobs"]
        assert len(listed) == 81


async def test_refusals_are_logged_and_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async with server() as at, worker(at.url) as client:
        update_task("nobody", 5, client=client)
        with job("not an id", user="u", client=client) as j:
            j.progress(5)
        j = job("a", user="u", client=client)
        await settled(client)
        await at.ask("DELETE", "/api/v2/jobs/a")
        j.progress(5)
        await settled(client)
        for _ in range(3):
            j.progress(6)
            await settled(client)
        j.complete()
        await settled(client)
        assert (await at.get("/api/v2/jobs/a")).status == 404  # deleted is deleted
    texts = [message for message in caplog.messages if "refused" in message]
    assert len([text for text in texts if text.startswith("job nobody: ") and "job_not_found" in text]) == 1
    assert len([text for text in texts if text.startswith("job a: ")]) == 2  # one for its news, one for its end
    assert any(text.startswith("job not an id: ") for text in texts)


async def test_strict_raises_what_the_server_refuses() -> None:
    async with server() as at, worker(at.url, strict=True) as client:

        def ended() -> None:
            with job("a", user="u", client=client):
                pass
            with pytest.raises(Rejected, match="job_ended") as raised:
                complete_task("a", client=client)
            assert raised.value.code == "job_ended"
            j = job("a", user="u", client=client)
            client.flush()
            with pytest.raises(Rejected, match="job_ended"):
                j.progress(5)

        await trio.to_thread.run_sync(ended)


async def test_an_end_that_is_refused_ends_the_job_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    async with server() as at, worker(at.url) as client:
        job("a", user="u", client=client).complete(result="x" * 100_000)  # over the bound of results
        job("b", user="u", client=client).complete(result="x" * 200_000)  # over that of updates
        job("c", user="u", client=client).fail("é" * 5000)
        job("d", user="u", client=client).complete(result={"when": object}, message="\ud800")
        await settled(client)
        seen = {name: await record(at, name) for name in "abcd"}
        assert [one["status"] for one in seen.values()] == ["completed", "completed", "failed", "completed"]
        assert "refused" in seen["a"]["message"]
        assert "too large" in seen["b"]["message"]
        assert seen["c"]["error"].endswith("é…")
        assert seen["d"]["result"] == {"when": "<class 'object'>"}
    assert [one.levelname for one in caplog.records].count("ERROR") == 2


async def test_odd_progress_is_made_to_fit() -> None:
    async with server() as at, worker(at.url) as client:
        j = job("a", user="u", client=client)
        for odd in (float("nan"), float("-inf"), "much", 12.3456):
            j.progress(odd)  # type: ignore[arg-type]
            await settled(client)
        assert (await record(at, "a"))["progress"] == 12.35
        j.progress(10**400)
        await settled(client)
        assert (await record(at, "a"))["progress"] == 100
        with pytest.raises(TypeError, match="did you mean 'stage'"):
            j.progress(5, stagge="x")  # type: ignore[call-arg]
        j.cancel()


async def test_news_gets_through_although_another_host_s_clock_is_ahead() -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        j = job("a", user="u", client=client)
        await settled(client)
        await at.publish("a", seq=2**60, stage="from there")
        for percent in range(1, 4):
            j.progress(percent)
            await settled(client)
        seen = await record(at, "a")
        assert (seen["progress"], seen["stage"]) == (3, "from there")
        j.complete()
        await settled(client)
        assert (await record(at, "a"))["status"] == "completed"


async def test_tokens_and_their_renewal() -> None:
    given: list[str] = []

    def renewed() -> str:
        given.append(token("w", capabilities=["publish"]) if len(given) else token("w", exp=1))
        return given[-1]

    async with server(auth=AUTH) as at, worker(at.url, token=renewed) as client:
        with job("a", user="u", client=client):
            pass
        await settled(client)
        assert (await at.get("/api/v2/jobs/a", bearer("u"))).json["status"] == "completed"
        assert len(given) > 1
        assert (await at.get("/api/v2/jobs/a", WORKER)).status == 404


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STATUSWIRE_URL", "https://status.example.com/base/")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATUSWIRE_SPOOL_DIR", raising=False)
    client = Client()
    assert client.transport.url == "https://status.example.com/base"
    Job("a", {"user": "u"}, client=client).complete()
    (journal,) = journals(tmp_path)
    assert journal.parent.parent == tmp_path / "statuswire"
    assert journal.parent.name.startswith("status-example-com-base-")
    assert journals(tmp_path)[0].stat().st_mode & 0o777 == 0o600
    client.close(0)
    for url in ("status.example.com", "ftp://x", "http://x:port", "http://x/?a=b", "http://me:secret@x"):
        with pytest.raises(ValueError, match=r"url|port|Port") as raised:
            Client(url)
        assert "secret" not in str(raised.value)
