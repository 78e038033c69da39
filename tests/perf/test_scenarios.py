"""Locust's users against the real server, and what is made of their events."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perf.measure import server
from perf.scenarios import Kind, Scenario, checks, native, native_checks, published, published_checks

ROOT = Path(__file__).parents[2]


def entry(method: str, name: str, times: dict[str, int], failures: int = 0) -> dict[str, Any]:
    number = sum(times.values()) + failures
    return {"method": method, "name": name, "num_requests": number, "num_failures": failures, "response_times": times}


def failed(*statistics: dict[str, Any]) -> list[str]:
    return [check.what.split(",")[0] for check in checks(list(statistics)) if check.passed is False]


@pytest.mark.slow
def test_every_kind_of_user_gets_all_its_updates() -> None:
    installed = ["make", "--silent", ".venv/load/.done"]
    subprocess.run(installed, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "perf.scenarios", "--tiny", "--seconds", "10"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # How late things are depends on what else this machine does; that they come does not.
    lines = [line.split(None, 1) for line in result.stdout.splitlines()[1:] if line.startswith(("  pass", "  FAIL"))]
    assert lines, result.stderr
    assert result.returncode == int(any(verdict == "FAIL" for verdict, _ in lines))
    late = [what for verdict, what in lines if verdict == "FAIL" and ", p9" not in what]
    assert not late, result.stdout + result.stderr
    told = {what.split(",")[0].strip() for _, what in lines}
    assert {"WebSocket delivery", "SSE delivery", "long-poll delivery", "set-up", "reconnection", "delivery"} <= told
    assert "cuts of all connections that failed" in told
    assert "pass  connections ended by these cuts" in result.stdout


@pytest.mark.slow
def test_what_is_too_much_for_locust_is_done_by_the_c_client() -> None:
    scenario = Scenario("native", {}, jobs=5, updates=500.0, batch=10, native=10)
    with (
        server("memory:", core=None) as target,
        published(scenario, url := f"http://127.0.0.1:{target.port}", 2.0, "") as of_publisher,
        native(scenario, url, 5, 2.0) as of_readers,
    ):
        told = [*of_publisher(), *of_readers()]
    assert [check.what for check in told if check.passed is False and ", p95" not in check.what] == []
    assert [check.what.split(",")[0] for check in told][3:] == [
        "native WebSocket delivery",
        "native set-up",
        "native delivery",
    ]
    assert "15 in all" in told[4].what


def test_what_is_in_time_and_whole_passes() -> None:
    delivered = [entry(method, "delivery", {"3": 990, "90": 10}) for method in ("WS", "SSE", "POLL", "GET")]
    assert failed(entry("WS", "connect", {"12": 100}), entry("WS", "reconnect", {"9": 20}), *delivered) == []


def test_what_is_late_fails() -> None:
    late = [entry("WS", "connect", {"50": 90, "120": 10}), entry("SSE", "delivery", {"10": 90, "2500": 10})]
    assert failed(*late) == ["WebSocket set-up", "SSE delivery"]


def test_what_is_lost_or_refused_fails() -> None:
    refused = entry("SSE", "connect", {"5": 97}, failures=3)
    again = entry("POLL", "reconnect", {"5": 95}, failures=5)
    lost = entry("WS", "delivery", {"5": 9980}, failures=20)
    assert failed(refused, again, lost) == ["set-up", "reconnection", "delivery"]


def test_a_run_without_deliveries_is_no_success() -> None:
    assert failed(entry("WS", "connect", {"5": 1})) == ["delivery"]
    assert failed() == ["set-up", "delivery"]


def test_a_stream_that_broke_off_and_a_failed_publish_are_told() -> None:
    fine = entry("WS", "connect", {"5": 1}), entry("WS", "delivery", {"5": 1})
    broken = entry("SSE", "stream", {}, failures=2), entry("HTTP", "publish", {"1": 4}, failures=1)
    assert failed(*fine, *broken) == ["connections that broke off uncut", "publishes that failed"]


def test_what_came_after_a_cut_counts_as_delivered_but_not_as_late() -> None:
    fine = entry("WS", "connect", {"5": 1}), entry("WS", "delivery", {"5": 1}), entry("HTTP", "cut all", {"1": 1})
    assert failed(*fine, entry("WS", "catch-up", {"3000": 50}), entry("WS", "cut", {"0": 3})) == []
    assert failed(*fine, entry("WS", "catch-up", {}, failures=1)) == ["delivery", "connections ended by these cuts"]


def test_native_readers_are_held_to_the_same() -> None:
    report = {"setup": {"p95_ms": 5.0}, "latency": {"p95_ms": 9.0}, "connections": 99, "deliveries": 999, "lost": 0}
    assert all(check.passed for check in native_checks(report, 100))
    late = {"setup": {"p95_ms": 150.0}, "latency": {"p95_ms": 600.0}, "lost": 2, "connections": 98}
    assert not any(check.passed for check in native_checks(report | late, 100))


def test_a_native_publisher_is_held_to_its_schedule() -> None:
    report = {"accepted": 995, "failed": 0, "unanswered": 0, "requests": 10, "seconds": 1.0}
    assert all(check.passed for check in published_checks(report, 1000))
    assert not any(check.passed for check in published_checks(report | {"seconds": 1.1, "unanswered": 1}, 1000))


def test_quantiles_are_over_all_that_was_counted() -> None:
    kind = Kind()
    kind.add(entry("WS", "delivery", {"1": 90, "200": 5}))
    kind.add(entry("SSE", "delivery", {"30": 5}))
    assert (kind.quantile(0.9), kind.quantile(0.95), kind.quantile(1.0)) == (1, 30, 200)
    assert Kind().quantile(0.5) == float("inf")
