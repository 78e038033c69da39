"""``/metrics`` of a real server, row by row, and what the figures are made from."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from server.counters import DELAY_MS, RECENT_SAMPLES, Counters, Delays
from server.metrics import METRICS, RECENT, Sample, delays_as_value, merged, quantile_ms, sample
from tests.redis_servers import running_server
from tests.server.figures import OPS, STATS, scrape, stats, value
from tests.streams import put, session
from tests.support import ADMIN, AUTH, ROOT, Answer, bearer, server, token, until

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
