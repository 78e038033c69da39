"""What a server says of itself, asked for and read."""

from __future__ import annotations

from typing import Any

from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.support import InProcess, bearer

STATS = "/api/v2/stats"
OPS = bearer("monitor", capabilities=["ops"])


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
