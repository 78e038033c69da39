"""Locust's users against the real server, and what is made of their events."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perf.scenarios import Kind, checks, native_checks

ROOT = Path(__file__).parents[2]


def entry(method: str, name: str, times: dict[str, int], failures: int = 0) -> dict[str, Any]:
    number = sum(times.values()) + failures
    return {"method": method, "name": name, "num_requests": number, "num_failures": failures, "response_times": times}


def failed(*statistics: dict[str, Any]) -> list[str]:
    return [check.what.split(",")[0] for check in checks(list(statistics)) if not check.passed]


@pytest.mark.slow
def test_every_kind_of_user_gets_all_its_updates() -> None:
    installed = ["make", "--silent", ".venv/load/.done"]
    subprocess.run(installed, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "perf.scenarios", "--tiny", "--seconds", "10", "--native", "20"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # How late things are depends on what else this machine does; that they come does not.
    lines = [line.split(None, 1) for line in result.stdout.splitlines()[1:]]
    assert lines, result.stderr
    late = [what for verdict, what in lines if verdict == "FAIL" and ", p9" not in what]
    assert not late, result.stdout + result.stderr
    told = {what.split(",")[0].strip() for _, what in lines}
    assert {"WebSocket delivery", "SSE delivery", "long-poll delivery", "set-up", "reconnection", "delivery"} <= told
    assert {"native set-up", "native delivery"} <= told


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
    assert failed(*fine, *broken) == ["streams that broke off", "publishes that failed"]


def test_native_readers_are_held_to_the_same() -> None:
    report = {"setup": {"p99_ms": 5.0}, "connections": 99, "deliveries": 999, "lost": 0}
    assert all(check.passed for check in native_checks(report, 100))
    late = report | {"setup": {"p99_ms": 150.0}, "lost": 2, "connections": 98}
    assert not any(check.passed for check in native_checks(late, 100))


def test_quantiles_are_over_all_that_was_counted() -> None:
    kind = Kind()
    kind.add(entry("WS", "delivery", {"1": 90, "200": 5}))
    kind.add(entry("SSE", "delivery", {"30": 5}))
    assert (kind.quantile(0.9), kind.quantile(0.95), kind.quantile(1.0)) == (1, 30, 200)
    assert Kind().quantile(0.5) == float("inf")
