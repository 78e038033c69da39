"""What one delivery, publish and connection costs stays within the budget, and the guard can tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf.budget import BUDGET, BudgetError, compare, per_thing, python
from perf.counts import FEW, MANY, MANY_POLLS, WATCHED

ROOT = Path(__file__).parents[2]
SUMS = {"yardstick": 1000, f"ws {FEW}": 400, f"ws {MANY}": 400 + 20 * (MANY - FEW)}
SUMS |= {f"sse {FEW}": 10, f"sse {MANY}": 10 + 30 * (MANY - FEW)}
SUMS |= {f"channels {FEW}": 5, f"channels {WATCHED}": 5 + 40 * (WATCHED - FEW)}
SUMS |= {f"poll {FEW}": 40, f"poll {MANY_POLLS}": 40 + 2 * 400 * (MANY_POLLS - FEW)}
TIMES = dict.fromkeys(SUMS, 1) | {"yardstick": 10} | dict.fromkeys((f"ws {FEW}", f"ws {MANY}"), 2)
TIMES |= {f"poll {FEW}": 2, f"poll {MANY_POLLS}": 2}


@pytest.mark.slow
def test_the_server_keeps_to_its_budget() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "perf.budget"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_delivery_is_what_more_readers_cost_and_a_channel_what_its_first_does() -> None:
    readings = {"delivery, ws": 10, "delivery, sse": 30, "long-poll answer": 400}
    assert per_thing(SUMS, TIMES) == {"yardstick": 100, "channel": 40, **readings}


def test_a_count_that_is_missing_is_an_error() -> None:
    with pytest.raises(BudgetError, match=f"ws {MANY}"):
        per_thing({name: value for name, value in SUMS.items() if name != f"ws {MANY}"}, TIMES)


def test_more_than_the_tolerance_is_over_budget() -> None:
    budget = {"python": "this", "instructions": {"yardstick": 100.0, "publish": 1000.0}}
    within, over = (
        [line.over for line in compare({"yardstick": 100, "publish": n}, budget, "this")] for n in (1050, 1070)
    )
    assert (within, over) == ([False, False], [False, True])


def test_on_another_python_the_yardstick_scales_the_budget() -> None:
    budget = {"python": "this", "instructions": {"yardstick": 100.0, "publish": 1000.0}}
    slower = compare({"yardstick": 150, "publish": 1600}, budget, "another")
    assert [line.over for line in slower] == [False, False]
    assert slower[1].ratio == pytest.approx(1600 / 1500)
    assert [line.over for line in compare({"yardstick": 100, "publish": 1600}, budget, "another")] == [False, True]


def test_a_budget_of_other_things_is_refused() -> None:
    with pytest.raises(BudgetError, match="make budget"):
        compare({"publish": 1}, {"python": "this", "instructions": {"yardstick": 1}}, "this")


def test_the_committed_budget_names_its_python_and_all_counts() -> None:
    budget = json.loads(BUDGET.read_text())
    assert budget["python"].split()[0] == python().split()[0]
    names = {"delivery, ws", "delivery, sse", "long-poll answer", "channel"}
    names |= {"publish", "connection, ws", "connection, sse"}
    assert names <= budget["instructions"].keys()
