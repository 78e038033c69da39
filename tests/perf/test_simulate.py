"""The model says what was measured, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perf.fleet import ROOM, SHARDS, Crowd, fleet
from perf.model import MEASURED, POINTS, Load, Point, simulate
from perf.simulate import DOCUMENT, fill, tables


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_the_measured_points_come_out(point: Point) -> None:
    found = simulate(point.load)
    if point.core is not None:
        assert found.core == pytest.approx(point.core, rel=0.15)
    assert 0.4 * point.p50 < found.p50 < 1.1 * point.p50
    assert found.p99 <= point.p99, "the model leaves out what only delays"
    assert found.updates_per_send == pytest.approx(point.updates_per_send, rel=0.1)
    assert found.deliveries_per_s == pytest.approx(point.load.rate * point.load.readers, rel=0.02)


def test_the_document_says_what_the_model_says() -> None:
    text = DOCUMENT.read_text()
    assert fill(text, tables()) == text, "python -m perf.simulate --write"


def test_a_document_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="0 places for the table 'points'"):
        fill("# Scaling", {"points": ""})


def test_a_delivery_costs_the_same_however_many_readers_and_channels_there_are() -> None:
    warm = replace(MEASURED, publish=0.0, flush=0.0, channel=0.0, turn_over=0.0)
    few, many = (simulate(Load(5, readers), warm) for readers in (10, 10_000))
    assert few.core / few.deliveries_per_s == pytest.approx(many.core / many.deliveries_per_s, rel=0.02)
    ones = simulate(Load(1_000, 1, channels=1_000, batch=10))
    same = simulate(Load(1_000, 1, channels=10, batch=10))
    assert ones.core == pytest.approx(same.core, rel=0.01)


def test_a_full_core_joins_updates_instead_of_falling_behind() -> None:
    found = simulate(Load(10_000, 2_000, batch=100))
    assert found.core == pytest.approx(1.0, abs=0.01)
    assert found.updates_per_send > 110
    assert found.deliveries_per_s == pytest.approx(20_000_000, rel=0.02)


def test_every_request_is_worked_off_once() -> None:
    found = simulate(Load(50, 7, channels=3, batch=5), seconds=2.0)
    assert found.deliveries_per_s == pytest.approx(50 * 7, rel=0.1)


@pytest.mark.parametrize("readers", [1_000, 30_000, 1_000_000, 100_000_000])
@pytest.mark.parametrize("crowd", [Crowd(0), Crowd(0, active=1.0, rate=2.0), Crowd(0, watchers=1_000.0)])
def test_no_node_and_no_redis_of_a_fleet_is_fuller_than_planned(readers: int, crowd: Crowd) -> None:
    found = fleet(replace(crowd, readers=readers))
    everyday = sum(found.loads.values()) - found.loads["coming back"]
    assert everyday / found.nodes <= ROOM + 1e-9
    assert sum(found.loads.values()) / found.nodes <= 1.0 + 1e-9
    assert found.updates * MEASURED.redis_itself / 1e6 / found.masters <= ROOM + 1e-9
    assert found.masters <= found.cells * SHARDS
    assert found.nodes >= found.cells


def test_what_costs_less_needs_fewer_nodes() -> None:
    crowd = Crowd(1_000_000)
    cheaper = replace(MEASURED, channel=0.0)
    assert fleet(crowd).first == "everyday work"
    assert fleet(replace(crowd, active=0.01)).first == "coming back"
    assert fleet(crowd, cheaper).nodes < fleet(crowd).nodes


def test_two_nodes_on_one_redis_cost_about_what_was_measured() -> None:
    found = fleet(Crowd(1_000, active=1.0, rate=10.0)).loads
    each = (found["sending"] + found["publishing"] + found["receiving"]) / 2 / 10_000 * 1e6
    assert each == pytest.approx(56.4, rel=0.25), "perf/results/2026-11-22-nodes.txt; a tenth are long-polls there"
