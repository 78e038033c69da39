"""What is drawn of a run, without drawing it."""

from __future__ import annotations

from typing import Any

from perf.plot import deliveries, features, publishes


def line(
    scenario: str, label: str, server: list[float], bare: list[float] | None = None, ratio: float | None = None
) -> dict[str, Any]:
    return {"scenario": scenario, "measure": {"label": label}, "server": server, "bare": bare or [], "ratio": ratio}


def test_lines_are_found_by_what_they_say() -> None:
    net = "server CPU per delivery, against the loop alone"
    auth = "auth (second column: without)"
    result = {
        "rows": [
            line("WebSocket, 1,000 readers", "server CPU per delivery, publish included", [9.0], [9.0]),
            line("WebSocket, 1,000 readers", net, [4.0, 5.0, 3.0], [3.0, 2.0, 2.5]),
            line("WebSocket, 10,000 readers", net, [5.0], [4.0]),
            line("memory, one by one", "server CPU per publish", [140.0]),
            line("Redis, through its stream", "server CPU per update", [60.0]),
            line(auth, "server CPU per publish, one by one", [2.0], [1.0], 2.0),
            line(auth, "server CPU per connection", [3.0], [2.0], 1.5),
        ]
    }
    assert deliveries(result, "WebSocket") == {
        "server": [(1_000, 4.0), (10_000, 5.0)],
        "bare": [(1_000, 2.5), (10_000, 4.0)],
    }
    assert publishes(result) == [("Redis, through its stream", 60.0), ("memory, one by one", 140.0)]
    assert features(result) == {"auth": [2.0, None, None, 1.5]}
