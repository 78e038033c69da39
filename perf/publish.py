"""Publishing: how many updates a second the server takes in, one by one and in batches, and what each costs."""

from __future__ import annotations

from functools import partial

from perf.load import LoadClient
from perf.measure import LOAD_CORE, Measure, Row, Start, Target, Watch, bare, in_pairs

MEASURES = (
    Measure("rate", "publishes/s", "/s", 0),
    Measure("each", "server CPU per publish", "µs", 2),
    Measure("p50", "answer p50", "ms", 2),
    Measure("p99", "answer p99", "ms", 2),
)
# One by one is a worker that waits for its answer; 16 of them let the store commit in groups.
WAYS: dict[str, dict[str, object]] = {
    "one by one, 1 publisher": {"connections": 1, "depth": 1},
    "one by one, 16 publishers": {"connections": 16, "depth": 1},
    "batches of 100, 2 publishers": {"connections": 2, "depth": 1, "batch": 100},
}


def publish(target: Target, client: LoadClient, seconds: float, options: dict[str, object]) -> dict[str, float]:
    """As fast as answered, to 100 jobs in turn that nobody watches."""
    watch = Watch(target, client.pid)
    published = client.ask("publish", "published", seconds + 30, port=target.port, jobs=100, seconds=seconds, **options)
    result = watch.stop()
    if published["failed"] or published["unanswered"] or published["error"]:
        raise OSError(f"publishing failed: {published}")
    return result | {
        "rate": published["accepted"] / published["seconds"],
        "each": result["cpu"] / published["accepted"] * 1e6,
        "p50": published["answer"]["p50_ms"],
        "p99": published["answer"]["p99_ms"],
    }


def run(start: Start, *, quick: bool) -> list[Row]:
    """The lines of both stores."""
    rows: list[Row] = []
    seconds, rounds = (0.2, 1) if quick else (0.5, 3)
    for store in ("memory:", "sqlite:"):
        with start(store) as real, bare() as loop, LoadClient(LOAD_CORE) as client:
            for way, options in WAYS.items():
                publish(real, client, 0.1, options)
                rows += in_pairs(
                    f"{store.rstrip(':')}, {way}",
                    MEASURES,
                    rounds,
                    partial(publish, real, client, seconds, options),
                    partial(publish, loop, client, seconds, options),
                )
    return rows
