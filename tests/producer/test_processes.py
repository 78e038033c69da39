"""Sudden death, fork, the end of the process: what was said to have ended is delivered, once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import msgspec
import pytest
import trio

from statuswire import job
from statuswire.spool import Entry, Spool
from tests.producer.workers import delivered, history, journals, record, run, settled, start, worker
from tests.support import PATIENCE_S, server, spawned, until

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9"  # discard: nobody listens there


async def kill_after(script: str, url: str, spool: Path) -> None:
    """Run a script until it says that it is there, and kill it at once."""
    with start(f"{script}\nprint('there', flush=True)\nsignal.pause()", url, spool) as process:
        assert process.stdout is not None
        said = await trio.to_thread.run_sync(process.stdout.readline)
        process.kill()
        assert said == b"there\n", process.communicate()[1].decode()


async def test_an_end_survives_the_death_of_its_process(tmp_path: Path) -> None:
    url = ""
    async with server() as at:
        url = at.url
        port = at.port
    script = "j = job('a', user='u', kind='x'); j.progress(40, stage='s'); j.complete({'rows': 1})"
    await kill_after(script, url, tmp_path / "spool")
    assert len(journals(tmp_path)) == 1
    async with server(server={"port": port}) as at:
        await run("assert flush()", url, tmp_path / "spool")
        updates = await history(at, "a")
        assert [(one["version"], one["status"], one["stage"]) for one in updates] == [(1, "completed", "s")]
        assert updates[0]["result"] == {"rows": 1}
        assert journals(tmp_path) == []
        await run("assert flush()", url, tmp_path / "spool")
        assert len(await history(at, "a")) == 1


async def test_what_was_sent_and_not_answered_counts_once(tmp_path: Path) -> None:
    async with server() as at:
        for number in range(5):
            # Killed somewhere between keeping, sending and hearing the answer.
            await kill_after(f"job('{number}', user='u').complete()", at.url, tmp_path)
        await run("assert flush()", at.url, tmp_path)
        for number in range(5):
            ends = [one for one in await history(at, str(number)) if one["status"] == "completed"]
            assert len(ends) == 1
        assert journals(tmp_path) == []


async def test_one_of_several_heirs_sends_what_was_left(tmp_path: Path) -> None:
    async with server() as at:
        port, url = at.port, at.url
    await kill_after("for n in range(50): job(f'{n}', user='u').complete()", url, tmp_path)
    async with server(server={"port": port}) as at, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(run, "assert flush()", url, tmp_path)
    assert journals(tmp_path) == []


async def test_the_spool_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    async with worker(NOWHERE, tmp_path) as one, worker(NOWHERE, tmp_path) as two:
        job("a", user="u", client=one).complete()
        assert not await trio.to_thread.run_sync(one.flush, 0)
        assert two.flush(0)  # it has nothing to send
        assert len(journals(tmp_path)) == 1


async def test_a_server_that_is_restarted(tmp_path: Path) -> None:
    async with spawned(tmp_path) as at:
        port = at.port
        async with worker(at.url, tmp_path / "spool", interval=0) as client:
            j = job("a", user="u", client=client)
            ended = job("b", user="u", client=client)
            await settled(client)
            at.signal(signal.SIGKILL)
            await trio.to_thread.run_sync(at.process.wait)
            started = time.perf_counter()
            for percent in range(1000):
                j.progress(percent / 10, stage=f"{percent}")
            ended.complete()
            assert time.perf_counter() - started < 1
            assert not await trio.to_thread.run_sync(client.flush, 0.3)
            async with spawned(tmp_path, server={"port": port}) as again:
                await settled(client)
                seen = await record(again, "a")
                assert (seen["progress"], seen["stage"]) == (99.9, "999")
                assert (await record(again, "b"))["status"] == "completed"
                assert len(await history(again, "a")) <= 4
                j.complete()
                await settled(client)
                assert (await record(again, "a"))["status"] == "completed"


async def test_an_ending_process_sends_what_it_has(tmp_path: Path) -> None:
    async with server() as at:
        patient = f"configure(exit_timeout={PATIENCE_S}); "
        await run(f"{patient}update_task('a', 40, user='u')", at.url, tmp_path)
        await run(f"{patient}job('b', user='u').complete()", at.url, tmp_path)
        await run(f"{patient}job('c', user='u').progress(30); sys.exit(3)", at.url, tmp_path, status=3)
        assert (await record(at, "a"))["progress"] == 40
        assert (await record(at, "b"))["status"] == "completed"
        assert (await record(at, "c"))["progress"] == 30
    assert journals(tmp_path) == []


async def test_requests_of_its_own_are_not_in_a_workers_log(tmp_path: Path) -> None:
    async with server() as at:
        script = """
import logging, httpx
logging.basicConfig(level=logging.INFO)
job('a', user='u').complete()
assert flush()
httpx.get(os.environ['STATUSWIRE_URL'] + '/health')
"""
        said = await run(script, at.url, tmp_path)
        assert said.count("HTTP Request") == 1
        assert "/health" in said


async def test_an_ending_process_does_not_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    started = trio.current_time()
    await run("job('b', user='u').complete()", NOWHERE, tmp_path)
    assert trio.current_time() - started < PATIENCE_S / 2
    assert len(journals(tmp_path)) == 1


async def test_nor_for_one_that_hangs(tmp_path: Path) -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        script = """
t = time.perf_counter()
j = job('b', user='u', ttl=5)
for n in range(1000): j.progress(n / 10)
j.complete()
assert time.perf_counter() - t < 2, time.perf_counter() - t
"""
        started = trio.current_time()
        await run(script, url, tmp_path)
        assert trio.current_time() - started < PATIENCE_S / 2
    assert len(journals(tmp_path)) == 1


FORK = """
j = job('parent', user='u', ttl=60)
j.progress(10)
flush()
pid = os.fork()
if not pid:
    with job('child', user='u') as k:
        k.progress(50)
    j.progress(20, stage='said by the child')
    os._exit(0 if flush() else 1)
assert os.waitpid(pid, 0)[1] == 0
j.progress(30, stage='said by the parent')
j.complete()
assert flush()
"""


async def test_fork(tmp_path: Path) -> None:
    async with server() as at:
        await run(FORK, at.url, tmp_path)
        assert (await record(at, "child"))["status"] == "completed"
        stages = [one.get("stage") for one in await history(at, "parent")]
        assert stages[-1] == "said by the parent"
        assert "said by the child" in stages
    assert journals(tmp_path) == []


async def test_a_fork_sends_nothing_twice(tmp_path: Path) -> None:
    async with server() as at:
        port, url = at.port, at.url
    script = """
j = job('a', user='u')
j.complete()
if not os.fork():
    flush(0.2)
    os._exit(0)
os.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""
    await run(script, url, tmp_path, status=-signal.SIGKILL)
    assert len(journals(tmp_path)) == 1  # the child did not take it for its own
    async with server(server={"port": port}) as at:
        await run("assert flush()", url, tmp_path)
        assert len(await history(at, "a")) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_multiprocessing(tmp_path: Path, method: str) -> None:
    file = tmp_path / "pool_of_workers.py"
    file.write_text(f"""
import multiprocessing, sys
from statuswire import configure, job, update_task

configure(exit_timeout=20)  # what a child cannot send in time is left for the next process

def work(number):
    with job(f"job-{{number}}", user="u") as j:
        j.progress(50)

def last_words(number):
    update_task(f"job-{{number}}", 70, user="u")

if __name__ == "__main__":
    work(0)
    context = multiprocessing.get_context("{method}")
    children = [context.Process(target=work, args=(n,)) for n in (1, 2)]
    children.append(context.Process(target=last_words, args=(3,)))
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
""")
    async with server() as at:
        await run(
            f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')" if method == "fork" else spawn(file),
            at.url,
            tmp_path / "spool",
        )
        await delivered(at.url, tmp_path / "spool")
        for number in range(3):
            assert (await record(at, f"job-{number}"))["status"] == "completed"
        assert (await record(at, "job-3"))["progress"] == 70
    assert journals(tmp_path) == []


def spawn(file: Path) -> str:
    return f"import subprocess; sys.exit(subprocess.call([sys.executable, {str(file)!r}]))"


async def test_a_dead_worker_shows(tmp_path: Path) -> None:
    async with server() as at:
        await kill_after("j = job('a', user='u', ttl=0.6); j.progress(5); flush()", at.url, tmp_path)
        await until(lambda: [one.latest.status for one in [at.node.jobs.get("a")] if one] == ["failed"])
        assert [one["status"] for one in await history(at, "a")][-3:] == ["processing", "stalled", "failed"]
        assert (await record(at, "a"))["error"] == "lost"


async def test_a_late_end_of_one_attempt_does_not_end_the_next(tmp_path: Path) -> None:
    async with server() as at, worker(at.url, tmp_path) as client:
        await at.publish("a", userId="u", status="failed")
        j = job("a", user="u", attempt=2, client=client)
        await settled(client)
        assert client._spool is not None
        left = Spool(client._spool.directory)
        ten_minutes_ago = time.time_ns() // 1000 - 600_000_000
        for name, attempt in (("a", None), ("b", None)):
            update = msgspec.Raw(b'{"jobId":"%s","userId":"u","status":"failed"}' % name.encode())
            left.keep(Entry(f"key {name}", ten_minutes_ago, name, update, attempt))
        left.close()
        await settled(client)
        assert (await record(at, "a"))["status"] == "processing"
        assert (await record(at, "b"))["status"] == "failed"
        j.complete()
        await settled(client)
        assert (await record(at, "a"))["status"] == "completed"


async def test_jobs_may_be_ended_by_a_signal_handler(tmp_path: Path) -> None:
    script = """
ended = 0
def end(*_):
    global ended
    ended += 1
    job(f"signal-{ended}", user="u").complete()
signal.signal(signal.SIGALRM, end)
for number in range(300):
    signal.setitimer(signal.ITIMER_REAL, number % 30 * 0.00002 + 0.00001)
    job(f"main-{number}", user="u").complete()
    while ended <= number:
        pass
assert flush(20)
print(ended)
"""
    async with server() as at:
        ended = int(await run(script, at.url, tmp_path))
        assert len(at.node.jobs) == ended + 300
    assert journals(tmp_path) == []


async def test_the_thread_ends_when_it_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statuswire.client.IDLE_S", 0.01)
    async with server() as at, worker(at.url) as client:
        for name in "ab":
            job(name, user="u", client=client).complete()
            await settled(client)
            await until(lambda: client._thread is None)
        assert (await record(at, "b"))["status"] == "completed"


async def test_a_disk_that_is_full_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way of a directory")
    async with server() as at, worker(at.url, tmp_path / "file") as client:
        job("a", user="u", client=client).complete()
        job("b", user="u", client=client).complete()
        await settled(client)
        assert (await record(at, "b"))["status"] == "completed"
    assert [one.levelname for one in caplog.records].count("ERROR") == 1
