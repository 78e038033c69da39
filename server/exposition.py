"""The text that Prometheus scrapes: ``prometheus_client`` writes it, from numbers that were there anyway."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from server.metrics import METRICS, Sample


class _Numbers(Collector):
    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        for metric in METRICS:
            value = self._sample.get(metric.name)
            if value is None:
                continue
            if metric.kind == "histogram":
                assert isinstance(value, dict)
                yield _histogram(metric.name, metric.help, value)
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=metric.labels)
            for key, number in value.items() if isinstance(value, dict) else (("", value),):
                family.add_metric(key.rsplit(" ", len(metric.labels) - 1) if metric.labels else (), number)
            yield family


def _histogram(name: str, text: str, value: dict[str, float]) -> Metric:
    counts = {bound: count for bound, count in value.items() if bound != "sum"}
    total = 0.0
    buckets = []
    for bound, count in counts.items():
        total += count
        buckets.append((bound, total))
    family = HistogramMetricFamily(name, text)
    family.add_metric((), buckets, value["sum"])
    return family


def exposition(sample: Sample, accept: str) -> tuple[str, bytes]:
    """Content type and text, in the format that the scraper's ``Accept`` asks for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(sample))
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)
