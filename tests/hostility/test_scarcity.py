"""When what everybody needs runs out or jumps: descriptors, memory, places, the clock. Each on a server of its own."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import pytest

from tests import certificates
from tests.hostility.attacks import MIB, SLACK, TLS_ATTACKS
from tests.hostility.siege import SECONDS, Ground, ground, newcomers_are_served, readers, siege
from tests.pacing import for_a_while
from tests.support import ADMIN, AUTH, WORKER, bearer, in_seconds, until, until_so

pytestmark = [pytest.mark.slow, pytest.mark.long]

LIMITS: dict[str, object] = {"head_timeout": 1, "body_timeout": 1, "auth_timeout": 1}


async def test_descriptors_run_out(tmp_path: Path) -> None:
    with ground(tmp_path, auth=AUTH, limits=LIMITS) as at:

        async def exhaust() -> int:
            # Now, so that readers, the store and whoever watches are in already.
            limit = at.descriptors() + 30
            with limited(at, resource.RLIMIT_NOFILE, limit):
                async with at.attacked("crowd") as attacked:
                    await at.at.logged("accept_paused")
                    assert at.descriptors() <= limit
                    await for_a_while(SECONDS)
            connects = attacked["connects"]
            assert isinstance(connects, int)
            return connects

        await siege(at, "no descriptors", SLACK, exhaust)


async def test_memory_is_short(tmp_path: Path) -> None:
    """What is let in fits into the memory that there is: nothing fails for want of it."""
    unfinished = 16 * MIB
    with ground(tmp_path, auth=AUTH, limits=LIMITS | {"unfinished": unfinished}) as at:
        await newcomers_are_served(at.at)  # with what is imported when it is first needed
        with limited(at, resource.RLIMIT_AS, virtual_memory(at) + 2 * unfinished + SLACK):
            for name, refused in (("unfinished bodies", "errors"), ("unfinished messages", "connectionsClosed")):

                async def until_refused(name: str = name, refused: str = refused) -> int:
                    async def some_are() -> int:
                        count: int = (await at.at.get("/api/v2/stats", ADMIN)).json[refused].get("try_later", 0)
                        return count

                    async with at.attacked(name) as attacked:
                        await until_so(some_are, every=0.05)
                    connects = attacked["connects"]
                    assert isinstance(connects, int)
                    return connects

                await siege(at, f"{name}, short of memory", 2 * unfinished + SLACK, until_refused)
        assert "MemoryError" not in at.at.log()


async def test_without_memory_a_request_fails_and_the_server_does_not(tmp_path: Path) -> None:
    with ground(tmp_path, auth=AUTH, limits=LIMITS) as at:
        await newcomers_are_served(at.at)
        with limited(at, resource.RLIMIT_AS, virtual_memory(at) + 12 * MIB):
            async with at.attacked("unfinished bodies"):
                await at.at.logged("MemoryError")
        async with readers(at.at) as victims:
            await for_a_while(SECONDS)
            await until(lambda: victims.published > 5)
        await newcomers_are_served(at.at)


@contextmanager
def limited(at: Ground, what: int, limit: int) -> Iterator[None]:
    """Lower one of the server's limits in this block."""
    _, hard = before = resource.prlimit(at.at.process.pid, what)
    resource.prlimit(at.at.process.pid, what, (limit, hard))
    yield
    resource.prlimit(at.at.process.pid, what, before)


def virtual_memory(at: Ground) -> int:
    match = re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{at.at.process.pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


async def test_one_address_opens_everything(tmp_path: Path) -> None:
    """Its own limit stops it: there is room for others, who come from elsewhere."""
    tables = {"server": {"max_connections": 400}, "limits": {**LIMITS, "connections_per_address": 100}}
    with ground(tmp_path, auth=AUTH, **tables) as at:
        report = await siege(at, "crowd", SLACK, source="127.0.0.2", title="crowd of one address")
        assert report.connects == 500
        stats = (await at.at.get("/api/v2/stats", ADMIN)).json
        assert stats["connectionsRefused"].get("too_many_connections", 0) == 0
        assert stats["connectionsRefused"]["rate_limited"] > 0
        assert stats["connectionsRefused"]["unheard"] > 0


async def test_tls_handshakes_that_are_left_half_done(tmp_path: Path) -> None:
    """Each takes six times the memory of a connection, for no longer than a head may take."""
    issued = certificates.make(tmp_path)
    attack = TLS_ATTACKS["half handshakes"]
    with ground(tmp_path, issued.trust, auth=AUTH, limits=LIMITS, server=issued.table) as at:
        await newcomers_are_served(at.at)
        report = await siege(at, "half handshakes", attack.memory, title="half TLS handshakes")
        assert report.connects >= attack.clients
        stats = (await at.at.get("/api/v2/stats", ADMIN)).json
        assert stats["connectionsRefused"]["tls_failed"] >= attack.clients


FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), Path("libfaketime.so.1"))


async def test_the_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour ahead, two back, and right again: updates go on in order, leases and connections live as they did."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
    monkeypatch.setenv("FAKETIME_CACHE_DURATION", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")  # as when somebody sets a real clock
    with ground(tmp_path, auth=AUTH, server={"heartbeat": 0.2}, store={"url": "memory:"}) as at:
        monkeypatch.delenv("LD_PRELOAD")

        async def dated(hours: int) -> bool:
            """Whether the server's clock is so much ahead; it is looked at when it is asked for."""
            answer = await at.at.get("/health")
            return abs(_seconds(answer.headers["date"]) - in_seconds(0) - 3600 * hours) <= 60

        async with at.at.connect() as http:
            body = {"userId": "alice", "status": "processing", "ttl": 60}
            answer = await http.request("POST", "/api/v2/jobs/leased/updates", body=body, headers=WORKER)
            assert answer.status == 200

        async def jump() -> int:
            for hours in (1, -1, 0):
                clock.write_text(f"{3600 * hours:+d}")
                await until_so(partial(dated, hours))
                await for_a_while(SECONDS)
                leased = (await at.at.get("/api/v2/jobs/leased", ADMIN)).json
                assert leased["status"] == "processing", "a lease does not run out with the clock"
            return 0

        await siege(at, "jumps of the clock", SLACK, jump)
        history = (await at.at.get("/api/v2/jobs/watched/history", bearer("alice"))).json["updates"]
        times = [update["timestamp"] for update in history]
        assert times == sorted(times), "times in the log never go back"
        stats = (await at.at.get("/api/v2/stats", ADMIN)).json
        assert stats["connectionsClosed"].get("stale", 0) == 0


def _seconds(date: str) -> float:
    return parsedate_to_datetime(date).timestamp()
