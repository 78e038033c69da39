"""``/metrics`` and ``/api/v2/stats`` of a real server, field by field, and what they are made from."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from server.counters import DELAY_MS, RECENT_SAMPLES, Counters, Delays
from server.metrics import METRICS, RECENT, Sample, delays_as_value, merged, quantile_ms, sample
from tests.redis_servers import running_server
from tests.streams import event_stream, lose_log, narrow, poll, put, reset_connection, session, websocket
from tests.support import ADMIN, AUTH, ROOT, Answer, InProcess, bearer, server, token, until

STATS = "/api/v2/stats"
OPS = bearer("monitor", capabilities=["ops"])
# Rows that are there only with a spool, with callbacks and with an auth hook.
ELSEWHERE = {
    "statuswire_queue_up",
    "statuswire_queue_open_jobs",
    "statuswire_spool_waiting",
    "statuswire_spool_bytes",
    "statuswire_spooled",
    "statuswire_spool_replayed",
    "statuswire_spool_rejected",
    "statuswire_callbacks",
    "statuswire_callbacks_waiting",
    "statuswire_auth_hook_asked",
    "statuswire_auth_hook_failed",
}
# Those that are there with a Redis store.
ONLY_REDIS = {
    "statuswire_store_commands",
    "statuswire_store_connects",
    "statuswire_ingest_dropped",
    "statuswire_ingest_dead",
    "statuswire_ingest_trimmed",
}


async def stats(at: InProcess, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = await at.get(STATS, headers or {})
    assert answer.status == 200, answer
    body = answer.json
    assert isinstance(body, dict)
    return body


async def scrape(at: InProcess) -> dict[str, Family]:
    """What Prometheus' own parser makes of a scrape, by name without ``_total``."""
    answer = await at.get("/metrics")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = list(parse_text(answer.body.decode()))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def value(families: dict[str, Family], name: str, **labels: str) -> float:
    """One sample."""
    found = [
        each.value
        for family in families.values()
        for each in family.samples
        if each.name == name and each.labels == labels
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


# --- stats --------------------------------------------------------------------------------------------------------


async def test_every_field_of_a_fresh_server() -> None:
    async with server() as at:
        assert (await stats(at)).keys() == {
            "totalConnections", "activeConnections", "byTransport", "connectionHealth", "averageConnectionTime",
            "connectionErrors", "connectionsClosed", "connectionsRefused", "sockets", "messagesDelivered", "delivered",
            "conflated", "deliveryLatencyMs", "readings", "published", "shown", "requests", "errors", "process",
            "jobs", "history", "broker", "draining", "uptime", "version",
        }  # fmt: skip
        seen = await stats(at)
        assert (seen["totalConnections"], seen["activeConnections"], seen["averageConnectionTime"]) == (0, 0, 0)
        assert seen["byTransport"] == {"websocket": 0, "sse": 0, "poll": 0}
        assert seen["connectionHealth"] == {"healthy": 0, "unhealthy": 0, "stale": 0}
        assert (seen["connectionErrors"], seen["messagesDelivered"]) == (0, 0)
        assert seen["deliveryLatencyMs"] == {"p50": 0, "p99": 0}
        assert seen["requests"] == {"2xx": 1}
        assert seen["broker"] == {
            "store": "memory", "available": True, "epoch": at.node.broker.epoch, "offset": 0, "logsLost": 0,
            "waiting": 0, "waitingBytes": 0,
        }  # fmt: skip
        assert seen["draining"] is False
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", seen["version"])
        process = seen["process"]
        assert process["cpuSeconds"] > 0
        assert process["memoryBytes"] > 10_000_000
        assert process["openFiles"] > 3
        assert process["tasks"] > 3
        assert process["loopLagMs"] >= 0


@pytest.mark.parametrize("store", ["memory:", "sqlite:"])
async def test_connections_updates_and_jobs_are_counted(store: str, tmp_path: Path) -> None:
    url = store if store == "memory:" else f"sqlite:{tmp_path / 'jobs.db'}"
    async with server(store={"url": url}) as at:
        async with session(at) as ws, event_stream(at, jobIds="a") as es, trio.open_nursery() as nursery:
            await ws.subscribe(jobIds=["a"])
            await es.until("snapshot")
            waiting = {"last_seen": f"{at.node.history.epoch}:0", "jobIds": "other", "timeout": 60}
            nursery.start_soon(lambda: poll(at, **waiting))
            await until(lambda: at.node.polls)
            seen = await stats(at)
            assert seen["byTransport"] == {"websocket": 1, "sse": 1, "poll": 1}
            assert (seen["activeConnections"], seen["totalConnections"]) == (3, 3)
            assert seen["connectionHealth"] == {"healthy": 3, "unhealthy": 0, "stale": 0}
            assert seen["sockets"] == 4

            await at.publish("a", userId="alice", progress=5)
            await at.publish("a", seq=1, status="processing")
            await at.publish("a", seq=1)
            assert (await at.post("/api/v2/jobs/a/updates", {"progress": 500})).status == 422
            assert (await at.post("/api/v2/jobs/none/updates", {"progress": 5})).status == 404
            answer = await at.post("/api/v2/updates", [{"jobId": "a", "progress": 9}, {"jobId": "a", "seq": 1}, {}])
            assert answer.status == 200
            published = await ws.ask(
                "publish", updates=[{"jobId": "b", "userId": "bob", "status": "failed"}, {"no": 1}]
            )
            while published["type"] != "published":
                published = await ws.receive()
            await es.updates("a", 3)
            seen = await stats(at)
            assert seen["published"] == {
                "http": {"accepted": 3, "duplicate": 2, "rejected": 3},
                "websocket": {"accepted": 1, "duplicate": 0, "rejected": 1},
            }
            assert seen["shown"] == seen["history"]["updates"] == seen["broker"]["offset"] == 4
            assert seen["history"]["bytes"] == at.node.history.bytes > 0
            assert seen["messagesDelivered"] == seen["delivered"]["live"] == 6
            assert 0 < seen["deliveryLatencyMs"]["p50"] <= seen["deliveryLatencyMs"]["p99"]
            assert seen["jobs"]["total"] == 2
            assert {status: count for status, count in seen["jobs"]["byStatus"].items() if count} == {
                "processing": 1, "failed": 1,
            }  # fmt: skip
            assert seen["requests"]["4xx"] == 2
            assert seen["errors"] == {"invalid_field": 1, "job_not_found": 1}
            assert seen["broker"]["store"] == store.rstrip(":")
            await at.publish("other", userId="alice")
        await until(lambda: not at.node.streams)
        seen = await stats(at)
        assert (seen["activeConnections"], seen["totalConnections"]) == (0, 3)
        assert seen["connectionsClosed"]["closed"] == 2
        assert seen["averageConnectionTime"] > 0
        assert seen["delivered"]["poll"] == 1
        assert seen["readings"] == {"snapshot": 2, "resume": 1, "reset": 0}


async def test_notifications_alone_have_a_delivery_time_too() -> None:
    async with server() as at, websocket(at) as ws:
        await ws.receive()
        await at.post("/api/sse/message", {"target": "broadcast", "event": "e", "data": 1})
        assert (await ws.receive())["type"] == "notification"
        assert sum(at.node.counters.delays.counts) == 1


async def test_what_is_delivered_is_what_readers_get() -> None:
    """Written directly, joined from several channels, filtered, spaced out, replayed: all count, once a reader."""
    async with server() as at, session(at) as direct, session(at) as several, session(at) as picky, session(at) as lazy:
        await direct.subscribe(jobIds=["a"])
        await several.subscribe(jobIds=["a"])
        await several.subscribe(all=True)
        await picky.subscribe(jobIds=["a"], types=["job_completed"])
        await lazy.subscribe(jobIds=["a"], minInterval=20)
        for progress in range(1, 40):
            put(at, "a", progress=progress)
        put(at, "a", status="completed")
        got = 0
        for ws in (direct, several, picky, lazy):
            got += len(await ws.updates("a", 40))
        assert (await stats(at))["delivered"] == {"live": got, "replay": 0, "poll": 0}
        assert 82 <= got < 160
        assert (await stats(at))["conflated"] == 160 - 39 - got
        async with event_stream(at, last_seen=f"{at.node.history.epoch}:30") as es:
            await es.updates("a", 40)
        assert (await stats(at))["delivered"]["replay"] == 10
        await poll(at, last_seen=f"{at.node.history.epoch}:35")
        assert (await stats(at))["delivered"]["poll"] == 5
        await poll(at, last_seen="elsewhere:1")
        assert (await stats(at))["readings"] == {"snapshot": 5, "resume": 2, "reset": 1}


async def test_a_slow_reader_shows() -> None:
    async with server(limits={"backlog": 200_000}) as at:
        async with session(at, receive_buffer=1) as ws:
            await ws.subscribe(all=True)
            narrow(at)
            await until(lambda: put(at, "j", message="x" * 1500) and at.node.counters.conflated > 0)
        async with session(at, receive_buffer=1) as ws:
            await ws.subscribe(all=True)
            narrow(at)
            names = (f"k{number}" for number in itertools.count())
            counters = at.node.counters
            await until(
                lambda: put(at, next(names), message="x" * 1500, status="failed") and counters.closed["overflow"]
            )
            assert (await stats(at))["connectionErrors"] >= 1


async def test_why_connections_ended(tmp_path: Path) -> None:
    async with server(auth=AUTH, limits={"connections_per_user": 1}, server={"drain": 0}) as at:
        counters = at.node.counters
        worker = bearer("w", capabilities=["publish"])
        await at.publish("a", worker, userId="alice")

        async def ended(reason: str) -> None:
            await until(lambda: counters.closed[reason] == 1 and not at.node.streams)

        async with websocket(at, token="x.y.z") as ws:
            assert (await ws.closed()).code == 4401
        await ended("unauthorized")
        async with session(at, token=token("bob")), websocket(at, token=token("bob")) as second:
            assert (await second.closed()).code == 4429
        await until(lambda: counters.closed["rate_limited"] == 1 and counters.closed["closed"] == 1)
        async with session(at, token=token("carol")) as ws:
            for _ in range(10):
                await ws.send_text("nonsense")
            assert (await ws.closed()).code == 1008
        await ended("policy")
        async with session(at, token=token("dave")) as ws:
            await ws.http.send(b"\xff" * 64)
            await ws.closed()
        await ended("protocol")
        async with session(at, token=token("erin", exp=time.time() + 0.3)) as ws:
            assert (await ws.closed()).code == 4401
        await ended("expired")
        async with event_stream(at, jobIds="a", headers=bearer("alice")) as es:
            await es.until("snapshot")
            await at.publish("a", worker, status="completed")
            await es.rest()
        await ended("finished")
        async with session(at, token=token("finn")):
            assert await at.node.presence.disconnect_user("finn") == 1
            await ended("disconnected")
        async with session(at, token=token("gert")) as ws:
            reset_connection(ws.http)
            await until(lambda: not at.node.streams)
        seen = await stats(at, OPS)
        assert seen["connectionErrors"] == 1 + seen["connectionsClosed"]["broken"]
        assert sum(seen["connectionsClosed"].values()) == seen["totalConnections"] == 9
        assert seen["errors"]["malformed_json"] == 10
        async with session(at, token=token("hal")) as ws:
            at.node.start_drain()
            await at.node.drain_streams(0)
            assert (await ws.closed()).code == 1001
        await ended("drain")


async def test_health_goes_by_the_last_sign_of_life() -> None:
    async with server() as at, session(at), session(at), session(at), event_stream(at) as es:
        await es.until("snapshot")
        now = trio.current_time()
        for stream, silent_s in zip(at.node.streams, (29, 36, 119, 121), strict=True):
            stream.heard_at = now - silent_s
        seen = await stats(at)
        assert seen["connectionHealth"] == {"healthy": 1, "unhealthy": 2, "stale": 1}
        assert value(await scrape(at), "statuswire_connections_health", health="unhealthy") == 2


async def test_patience_is_configured() -> None:
    patience = {"check_interval": 0.05, "unhealthy_after": 60, "stale_after": 300}
    async with server(health=patience) as at, session(at), session(at) as unlucky, session(at):
        now = trio.current_time()
        for stream, silent_s in zip(at.node.streams, (61, 301, 69), strict=True):
            stream.heard_at = now - silent_s
        assert (await unlucky.closed()).code == 1008
        assert (await stats(at))["connectionHealth"] == {"healthy": 1, "unhealthy": 1, "stale": 0}


async def test_a_slow_heartbeat_makes_nobody_unhealthy() -> None:
    async with server(server={"heartbeat": 90}) as at, session(at), session(at):
        now = trio.current_time()
        for stream, silent_s in zip(at.node.streams, (89, 300), strict=True):
            stream.heard_at = now - silent_s
        assert (await stats(at))["connectionHealth"] == {"healthy": 1, "unhealthy": 1, "stale": 0}


async def test_a_lost_log_and_a_store_that_is_away_show() -> None:
    async with server() as at:
        lose_log(at)
        at.node.broker._away = "the disk is full"  # type: ignore[attr-defined]
        broker = (await stats(at))["broker"]
        assert (broker["logsLost"], broker["available"], broker["reason"]) == (1, False, "the disk is full")
        families = await scrape(at)
        assert value(families, "statuswire_store_up") == value(families, "statuswire_ready") == 0
        assert value(families, "statuswire_logs_lost_total") == 1


async def test_sockets_that_were_turned_away() -> None:
    async with server(server={"max_connections": 1}) as at, at.connect() as held:
        assert (await held.request("GET", "/health")).status == 200
        for _ in range(2):
            assert (await at.get("/api/v2/jobs")).status == 503
        seen = (await held.request("GET", STATS)).json
        refused = seen["connectionsRefused"]
        assert refused == dict.fromkeys(refused, 0) | {"too_many_connections": 2}
    async with server(limits={"connects_per_second": 1}) as at, at.connect() as held:
        assert (await held.request("GET", "/health")).status == 200
        assert (await at.get("/api/v2/jobs")).status == 429
        seen = (await held.request("GET", STATS)).json
        assert (seen["connectionsRefused"]["rate_limited"], seen["errors"]) == (1, {"rate_limited": 1})


# --- metrics ------------------------------------------------------------------------------------------------------


async def test_every_metric_is_there_as_the_table_says() -> None:
    async with server() as at:
        await at.get("/api/v2/jobs/none")  # labels come with the first event
        families = await scrape(at)
    expected = {metric.name.removesuffix("_total"): metric for metric in METRICS}
    assert families.keys() == expected.keys() - ONLY_REDIS - ELSEWHERE
    for name, family in families.items():
        metric = expected[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        labels = {label for each in family.samples for label in each.labels}
        assert labels == set(metric.labels) | ({"le"} if metric.kind == "histogram" else set()), name
        assert re.fullmatch(r"(statuswire|process)(_[a-z]+)+", name)


async def test_values_agree_with_what_happened() -> None:
    async with server() as at, session(at) as ws:
        await ws.subscribe(jobIds=["a"])
        await at.publish("a", userId="alice")
        await ws.updates("a", 1)
        await at.get("/nowhere/at/all")
        await at.ask("BREW", "/health")
        async with at.connect() as http:
            await http.send(b"nonsense\r\n\r\n")
            await http.answer()
        families = await scrape(at)
        requests = "statuswire_http_requests_total"
        assert value(families, requests, method="POST", route="/api/v2/jobs/{jobId}/updates", status="2xx") == 1
        assert value(families, requests, method="-", route="-", status="4xx") == 2
        assert value(families, requests, method="-", route="/health", status="4xx") == 1
        assert value(families, "statuswire_connections", transport="websocket") == 1
        assert value(families, "statuswire_updates_delivered_total", way="live") == 1
        assert value(families, "statuswire_websocket_messages_received_total") == 1
        assert value(families, "statuswire_delivery_seconds_bucket", le="+Inf") == 1
        assert value(families, "statuswire_delivery_seconds_count") == 1
        assert value(families, "statuswire_errors_total", code="not_found") == 1
        assert value(families, "statuswire_channels") == 1
        assert value(families, "statuswire_jobs", status="queued") == 1
        assert abs(value(families, "process_start_time_seconds") - time.time()) < 600
        before = value(families, "statuswire_connection_seconds_total")
        assert value(await scrape(at), "statuswire_connection_seconds_total") > before


async def test_openmetrics_for_those_who_ask() -> None:
    async with server() as at:
        answer = await at.get("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0, */*;q=0.1"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        names = {family.name for family in parse_openmetrics(answer.body.decode())}
        assert "statuswire_connections" in names
        assert answer.body.endswith(b"# EOF\n")
        head = await at.ask("HEAD", "/metrics")
        assert (head.status, head.body) == (200, b"")


async def test_metrics_are_answered_while_draining_and_when_the_server_is_full() -> None:
    async with server(server={"max_connections": 1}) as at, at.connect() as held:
        assert (await held.request("GET", "/health")).status == 200
        assert (await at.get("/metrics")).status == 200
        at.node.start_drain()
        answer = await at.get("/metrics")
        assert b"\nstatuswire_ready 0.0\n" in answer.body
        assert (await at.get(STATS)).status == 503


@pytest.mark.parametrize("target", ["/metrics", STATS])
async def test_who_may_look(target: str) -> None:
    async with server() as at:
        assert (await at.get(target)).status == 200

    def seen(answer: Answer) -> tuple[int, str]:
        return answer.status, "" if answer.status == 200 else answer.error

    async with server(auth=AUTH) as at:
        assert seen(await at.get(target)) == (401, "unauthorized")
        assert seen(await at.get(target, bearer("alice"))) == (403, "forbidden")
        assert seen(await at.get(target, bearer("alice", capabilities=["publish", "notify"]))) == (403, "forbidden")
        assert seen(await at.get(target, OPS)) == (200, "")
        assert seen(await at.get(target, ADMIN)) == (200, "")
        assert seen(await at.get(f"{target}?access_token={token('m', capabilities=['ops'])}")) == (200, "")
        assert (await at.ask("POST", target, {})).headers["allow"] == "GET, HEAD, OPTIONS"


async def test_what_the_application_is_asked_and_told_has_rows_of_its_own() -> None:
    tables: dict[str, Any] = {
        "auth": AUTH | {"hook_url": "http://127.0.0.1:9/who"},
        "callbacks.app one": {"url": "http://127.0.0.1:9/ended", "secret": "s" * 32},
    }
    async with server(**tables) as at:
        assert (await at.get("/api/v2/jobs", {"Cookie": "session=1"})).status == 503
        answer = await at.get("/metrics", OPS)
        families = {family.name: family for family in parse_text(answer.body.decode())}
        assert families.keys() >= {name for name in ELSEWHERE if "spool" not in name and "queue" not in name}
        assert value(families, "statuswire_auth_hook_asked_total") == 1
        assert value(families, "statuswire_auth_hook_failed_total") == 1
        assert value(families, "statuswire_callbacks_total", callback="app one", outcome="told") == 0
        put(at, "a", status="completed")
        await until(lambda: at.node.callbacks and at.node.callbacks.tellers[0].counts.failed)
        answer = await at.get("/metrics", OPS)
        families = {family.name: family for family in parse_text(answer.body.decode())}
        assert value(families, "statuswire_callbacks_waiting", callback="app one") == 1


async def test_a_spool_has_figures_of_its_own(tmp_path: Path) -> None:
    with running_server(tmp_path) as redis:
        url = f"redis://127.0.0.1:{redis.port}/0"
        async with server(store={"url": url, "spool": True, "spool_path": str(tmp_path / "spool.db")}) as at:
            families = await scrape(at)
            assert families.keys() >= {name for name in ELSEWHERE if "spool" in name}
            assert value(families, "statuswire_spool_waiting") == 0
            assert (await stats(at))["broker"]["spoolPending"] == 0


async def test_notifications_are_counted() -> None:
    async with server() as at:
        notice = {"target": "user", "targetId": "ann", "event": "e", "data": 1, "store": True, "eventId": "k"}
        for _ in range(2):
            assert (await at.post("/api/sse/message", notice)).status == 200
        assert (await at.post("/api/sse/message", notice | {"data": 2})).status == 422
        families = await scrape(at)
        for outcome in ("accepted", "duplicate", "rejected"):
            assert value(families, "statuswire_notifications_total", outcome=outcome) == 1
        assert value(families, "statuswire_inbox_places") == 1


async def test_redis_has_figures_of_its_own(tmp_path: Path) -> None:
    with running_server(tmp_path) as redis:
        async with server(store={"url": f"redis://127.0.0.1:{redis.port}/0"}) as at:
            await until(lambda: at.node.broker.available is None)
            assert (await at.get("/api/v2/jobs")).status == 200  # follows everything from here on
            await at.publish("a", userId="alice")
            broker = (await stats(at))["broker"]
            assert (broker["store"], broker["offset"], broker["connects"]) == ("redis", 1, 1)
            families = await scrape(at)
            assert families.keys() >= ONLY_REDIS
            assert value(families, "statuswire_store_connects_total") == 1


def test_the_documentation_has_every_metric_and_no_other() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `((?:statuswire|process)_\w+)`(?:\{([a-z, ]+)\})? \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert rows == [(metric.name, ", ".join(metric.labels), metric.kind, metric.help) for metric in METRICS]


# --- counting -----------------------------------------------------------------------------------------------------


def test_samples_of_several_processes_are_one() -> None:
    one: Sample = {"statuswire_sockets": 2, "statuswire_ready": 1, "statuswire_log_offset": 7, "other": 1}
    two: Sample = {"statuswire_sockets": 3, "statuswire_ready": 0, "statuswire_log_offset": 9}
    assert merged([one, two]) == {"statuswire_sockets": 5, "statuswire_ready": 0, "statuswire_log_offset": 9}
    labelled: list[Sample] = [{"statuswire_errors_total": {"a": 1, "b": 2}}, {"statuswire_errors_total": {"b": 3}}]
    assert merged(labelled) == {"statuswire_errors_total": {"a": 1, "b": 5}}
    assert merged([{"statuswire_errors_total": {}}] * 2) == {"statuswire_errors_total": {}}
    assert merged([]) == {}


async def test_a_sample_is_all_that_the_table_has_and_survives_merging() -> None:
    async with server() as at:
        found = sample(at.node)
        absent = ONLY_REDIS | ELSEWHERE
        assert found.keys() >= {each.name for each in METRICS if each.name.removesuffix("_total") not in absent}
        assert found.keys() - {RECENT} <= {each.name for each in METRICS}
        assert merged([found]) == found


@given(st.lists(st.floats(0, 40_000), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_quantiles_lie_in_the_bucket_of_the_true_one(delays: list[float], share: float) -> None:
    counts = [0] * (len(DELAY_MS) + 1)
    for delay in delays:
        counts[sum(delay > bound for bound in DELAY_MS)] += 1
    rank = max(0, -(-int(share * len(delays) * 1000) // 1000) - 1)
    true = sorted(delays)[min(rank, len(delays) - 1)]
    low, high = 0.0, DELAY_MS[-1]
    for bound in DELAY_MS:
        if true <= bound:
            high = bound
            break
        low = bound
    assert low <= quantile_ms(delays_as_value(counts, 0.0), share) <= high or share == 0.0


def test_recent_delays_outweigh_old_ones() -> None:
    delays = Delays()
    for _ in range(3 * RECENT_SAMPLES):
        delays.add(int(time.time() * 1000) - 60_000)
    assert quantile_ms(delays_as_value(delays.recent, 0.0), 0.5) == DELAY_MS[-1]
    for _ in range(3 * RECENT_SAMPLES):
        delays.add(int(time.time() * 1000))
    assert quantile_ms(delays_as_value(delays.recent, 0.0), 0.5) < 1000
    assert sum(delays.counts) == 6 * RECENT_SAMPLES
    assert delays.sum_ms >= 60_000 * 3 * RECENT_SAMPLES - 1


def test_average_connection_time_needs_no_table() -> None:
    counters = Counters()
    counters.open("websocket", 10.0)
    counters.open("sse", 11.0)
    counters.close("closed", 14.0)
    assert counters.lived_s + 1 * 20.0 == (14 - 10) + (20 - 11)
