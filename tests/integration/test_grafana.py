"""The dashboard and the alert rules ask for metrics that there are, with labels that these have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support import ROOT, server

GRAFANA = ROOT / "tools" / "grafana"
# Made by Prometheus itself for each target, and the labels it gives every sample of one.
UP = "up"
TARGET_LABELS = {"instance", "job"}
# What Grafana puts in before it asks.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


def dashboard() -> Any:
    return json.loads((GRAFANA / "statuswire.json").read_text(encoding="utf-8"))


def alerts() -> list[Any]:
    (group,) = yaml.safe_load((GRAFANA / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules = group["rules"]
    assert isinstance(rules, list)
    return rules


def expressions() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            text = str(target["expr"])
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            assert "$" not in text
            yield text
    for rule in alerts():
        yield rule["expr"]


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric of an expression, with the labels that it is narrowed by."""

    def walk(part: Any) -> Iterator[Any]:
        if isinstance(part, promql_parser.VectorSelector):
            yield part
        for name in ("expr", "lhs", "rhs", "vector_selector", "vs"):
            if (inner := getattr(part, name, None)) is not None:
                yield from walk(inner)
        args = getattr(part, "args", None)
        for inner in args if isinstance(args, list) else ():
            yield from walk(inner)

    selectors = list(walk(promql_parser.parse(expression)))
    assert selectors, expression
    # Whatever the walk might miss, the text cannot hide.
    assert {each.name for each in selectors} == set(re.findall(r"\b(?:(?:statuswire|process)_\w+|up)\b", expression))
    for each in selectors:
        yield each.name, {matcher.name for matcher in each.matchers.matchers}


async def scraped() -> dict[str, set[str]]:
    """The names of all samples of a running server, each with its labels."""
    async with server() as at:
        await at.get("/nowhere")  # so that there is an error
        text = (await at.get("/metrics")).body.decode()
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


async def test_every_metric_and_label_exists() -> None:
    samples = await scraped()
    samples[UP] = set()
    count = 0
    for expression in expressions():
        for name, labels in asked(expression):
            assert name in samples, expression
            assert labels <= samples[name] | TARGET_LABELS, expression
            count += 1
    assert count > 35


async def test_what_sums_are_kept_by_are_labels() -> None:
    samples = await scraped()
    for expression in expressions():
        names = [name for name, _ in asked(expression)]
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            for label in group.split(", "):
                assert label in TARGET_LABELS or any(label in samples[name] for name in names), expression


def test_the_dashboard_can_be_imported() -> None:
    found = dashboard()
    assert (found["uid"], found["title"]) == ("statuswire", "statuswire")
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["title"]
    variables = {variable["name"] for variable in found["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(found))) <= variables | {"__rate_interval", "__all"}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_alerts_say_what_to_know(rule: Any) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]


async def test_values_of_labels_that_alerts_ask_for_exist() -> None:
    async with server() as at:
        text = (await at.get("/metrics")).body.decode()
        at.node.counters.error("internal_error")
    for rule in alerts():
        for label, value in re.findall(r'(reason|health)[!=~]+"([^"]*)"', rule["expr"]):
            for one in value.split("|"):
                assert f'{label}="{one}"' in text, rule["alert"]
