"""Parents and parts: sums that are exact whatever the order."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.fields import decode_fields
from protocol.job import apply, create, roll_up
from protocol.rollup import WEIGHT_UNIT, all_ended, climb, end_of, mean_progress, moved, steps_of
from protocol.update import ENDED, Job, Parts

NOW = 1_700_000_000_000


class Tree:
    """Jobs with their ancestors kept up to date, as a broker does it."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.offset = 0

    def publish(self, job_id: str, **given: Any) -> None:
        fields = decode_fields(json.dumps(given).encode())
        before = self.jobs.get(job_id)
        if before is None:
            parent = self.jobs.get(given.get("parentId", ""))
            after = create(fields, job_id=job_id, user_id="u", parent=parent, offset=self.offset + 1, now_ms=NOW)
        else:
            after = apply(before, fields, offset=self.offset + 1, now_ms=NOW)
        self._take(before, after)

    def delete(self, job_id: str) -> None:
        self._take(self.jobs[job_id], None)

    def _take(self, before: Job | None, after: Job | None) -> None:
        self.offset += 1

        def roll(job: Job, parts: Parts | None, started: bool, offset: int) -> Job:
            return roll_up(job, parts, part_started=started, offset=offset, now_ms=NOW)

        ancestors = climb(before, after, self.jobs.get, roll, self.offset)
        changed = after or before
        assert changed is not None
        if after is None:
            del self.jobs[changed.latest.job_id]
        else:
            self.jobs[changed.latest.job_id] = after
        for job in ancestors:
            if job.latest.offset > self.offset:
                assert job.latest.offset == self.offset + 1
                self.offset += 1
            self.jobs[job.latest.job_id] = job

    def shown(self, job_id: str) -> dict[str, Any]:
        body = json.loads(self.jobs[job_id].latest.body)
        assert isinstance(body, dict)
        return body

    def state(self, job_id: str) -> tuple[Any, ...]:
        record = self.shown(job_id)
        return record["status"], record["progress"], record.get("steps"), record["version"]


@pytest.fixture
def tree() -> Tree:
    tree = Tree()
    tree.publish("p")
    return tree


def test_progress_and_steps_come_from_the_parts(tree: Tree) -> None:
    tree.publish("a", parentId="p")
    tree.publish("b", parentId="p", weight=3)
    assert tree.state("p") == ("queued", 0, {"done": 0, "total": 2, "failed": 0}, 3)
    tree.publish("b", status="processing", progress=50)
    assert tree.state("p") == ("processing", 37.5, {"done": 0, "total": 2, "failed": 0}, 4)
    tree.publish("a", status="failed")
    assert tree.state("p") == ("processing", 62.5, {"done": 0, "total": 2, "failed": 1}, 5)
    tree.publish("b", status="completed")
    assert tree.state("p") == ("processing", 100, {"done": 1, "total": 2, "failed": 1}, 6)
    tree.publish("a", attempt=2)
    assert tree.state("p") == ("processing", 75, {"done": 1, "total": 2, "failed": 0}, 7)


def test_a_change_that_does_not_show_makes_no_entry(tree: Tree) -> None:
    tree.publish("a", parentId="p", status="processing")
    offset = tree.offset
    tree.publish("a", message="hello")
    assert tree.offset == offset + 1
    tree.publish("a", progress=0.001)  # below the two decimals that are shown, but it counts
    assert tree.offset == offset + 2
    assert tree.jobs["p"].private.parts == Parts(WEIGHT_UNIT, WEIGHT_UNIT * 1000, 1, 0, 0)


def test_what_is_published_for_a_parent_itself_is_left_out(tree: Tree) -> None:
    tree.publish("a", parentId="p", progress=20)
    tree.publish("p", progress=90, steps={"done": 9}, message="applies")
    assert tree.shown("p") | {"progress": 20, "steps": {"done": 0, "total": 1, "failed": 0}} == tree.shown("p")
    assert tree.shown("p")["message"] == "applies"


def test_progress_may_fall_when_parts_are_added(tree: Tree) -> None:
    tree.publish("a", parentId="p", progress=80)
    tree.publish("b", parentId="p")
    assert tree.shown("p")["progress"] == 40


def test_only_a_started_part_starts_the_parent(tree: Tree) -> None:
    tree.publish("a", parentId="p", status="stalled")
    assert tree.shown("p")["status"] == "queued"
    tree.publish("a", status="processing")
    assert tree.shown("p")["status"] == "processing"


def test_deleting_a_part_removes_its_share(tree: Tree) -> None:
    tree.publish("a", parentId="p", progress=80)
    tree.publish("b", parentId="p", status="completed")
    tree.delete("b")
    assert tree.state("p")[1:3] == (80, {"done": 0, "total": 1, "failed": 0})
    tree.delete("a")
    assert tree.shown("p")["progress"] == 0
    assert "steps" not in tree.shown("p")
    assert tree.jobs["p"].private.parts is None


def test_parts_outlive_their_parent_and_ignore_its_successor(tree: Tree) -> None:
    tree.publish("a", parentId="p", progress=80)
    tree.delete("p")
    tree.publish("a", progress=90)
    tree.publish("p")
    tree.publish("a", status="completed")
    assert tree.state("p") == ("queued", 0, None, 1)


def test_auto_complete(tree: Tree) -> None:
    tree.publish("p", autoComplete=True)
    tree.publish("a", parentId="p")
    tree.publish("b", parentId="p")
    tree.publish("a", status="completed")
    assert tree.shown("p")["status"] == "processing"
    tree.publish("b", status="completed")
    assert (tree.shown("p")["status"], tree.shown("p")["progress"], "error" in tree.shown("p")) == (
        "completed",
        100,
        False,
    )
    assert tree.jobs["p"].latest.type == "job_completed"


def test_auto_complete_with_failed_parts(tree: Tree) -> None:
    tree.publish("p", autoComplete=True)
    for name in "abc":
        tree.publish(name, parentId="p")
    for name, status in zip("abc", ("cancelled", "failed", "completed"), strict=True):
        tree.publish(name, status=status)
    record = tree.shown("p")
    assert (record["status"], record["error"], "endedAt" in record) == ("failed", "2 of 3 parts failed", True)
    tree.publish("p", attempt=2)  # reopening does not end it again at once
    assert tree.shown("p")["status"] == "processing"
    tree.publish("a", attempt=2, status="completed")
    assert tree.shown("p")["error"] == "1 of 3 parts failed"


def test_auto_complete_asked_for_late(tree: Tree) -> None:
    tree.publish("a", parentId="p", status="completed")
    assert tree.shown("p")["status"] == "processing"
    tree.publish("p", autoComplete=True)
    assert tree.shown("p")["status"] == "completed"


def test_deleting_the_last_live_part_can_end_the_parent(tree: Tree) -> None:
    tree.publish("p", autoComplete=True)
    tree.publish("a", parentId="p")
    tree.publish("b", parentId="p")
    tree.publish("a", status="completed")
    tree.delete("b")
    assert tree.shown("p")["status"] == "completed"


def test_an_ended_parent_changes_no_more_but_remembers(tree: Tree) -> None:
    tree.publish("a", parentId="p")
    tree.publish("p", status="failed", error="gave up")
    ended = tree.state("p")
    tree.publish("a", progress=60)
    assert tree.state("p") == ended
    tree.publish("p", attempt=2)
    assert tree.shown("p")["progress"] == 60


def test_changes_climb_through_all_levels(tree: Tree) -> None:
    for level in range(1, 5):
        tree.publish(f"p{level}", parentId="p" if level == 1 else f"p{level - 1}")
    before = tree.offset
    tree.publish("p4", status="processing", progress=12.5)
    assert tree.offset == before + 5
    assert {tree.shown(name)["progress"] for name in ("p", "p1", "p2", "p3", "p4")} == {12.5}
    assert {tree.shown(name)["status"] for name in ("p", "p1", "p2", "p3")} == {"processing"}


def test_the_mean_is_rounded_half_up_to_two_decimals() -> None:
    def mean(*shares: tuple[float, float]) -> int | float:
        weights = [round(weight * WEIGHT_UNIT) for weight, _ in shares]
        weighted = sum(unit * round(progress * 1e6) for unit, (_, progress) in zip(weights, shares, strict=True))
        return mean_progress(Parts(sum(weights), weighted, len(shares)))

    assert mean((1, 0), (1, 0), (1, 100)) == 33.33
    assert mean((1, 0), (2, 100)) == 66.67
    assert mean((1, 0.005)) == 0.01
    assert mean((0.1, 10), (0.2, 10)) == 10
    assert isinstance(mean((1, 50)), int)
    assert mean((1e9, 100), (1e-6, 0)) == 100


def test_sums_start_and_end_empty(tree: Tree) -> None:
    tree.publish("a", parentId="p")
    part = tree.jobs["a"]
    assert moved(None, None, part) == Parts(WEIGHT_UNIT, 0, 1, 0, 0)
    assert moved(Parts(WEIGHT_UNIT, 0, 1, 0, 0), part, None) is None
    assert all_ended(Parts(1, 1, 2, 1, 1))
    assert not all_ended(Parts(1, 1, 2, 1, 0))
    assert end_of(Parts(1, 1, 300, 298, 2)) == ("failed", "2 of 300 parts failed")
    assert steps_of(Parts(1, 1, 3, 2, 1)).failed == 1


changes = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.one_of(
            st.just("delete"),
            st.fixed_dictionaries(
                {},
                optional={
                    "progress": st.floats(0, 100) | st.integers(0, 100),
                    "weight": st.floats(1e-6, 1e9) | st.integers(1, 5),
                    "status": st.sampled_from(["processing", "completed", "failed", "cancelled", "stalled"]),
                    "attempt": st.integers(1, 3),
                    "reset": st.booleans(),
                },
            ),
        ),
    ),
    max_size=25,
)


@given(changes)
def test_the_sums_equal_those_from_scratch(steps: list[tuple[int, Any]]) -> None:
    tree = Tree()
    tree.publish("p")
    weights: dict[str, float] = {}
    for number, change in steps:
        name = f"part{number}"
        job = tree.jobs.get(name)
        if change == "delete":
            if job is not None:
                tree.delete(name)
                del weights[name]
            continue
        if job is None:
            tree.publish(name, parentId="p", **change)
            weights[name] = change.get("weight", 1)
        else:
            if "attempt" in change:
                change = change | {"attempt": max(change["attempt"], tree.shown(name)["attempt"])}
            if job.latest.status in ENDED:
                change = change | {"attempt": tree.shown(name)["attempt"] + 1}
            tree.publish(name, **change)
            weights[name] = change.get("weight", weights[name])
        total = Fraction(0)
        weighted = Fraction(0)
        for part, weight in weights.items():
            record = tree.shown(part)
            unit = Fraction(max(1, round(weight * WEIGHT_UNIT)))
            total += unit
            weighted += unit * (100 if record["status"] in ENDED else Fraction(round(record["progress"] * 1e6), 10**6))
        statuses = [tree.shown(part)["status"] for part in weights]
        parent = tree.shown("p")
        assert abs(Fraction(parent["progress"]) - weighted / total) <= Fraction(50001, 10**7)
        assert parent["steps"] == {
            "done": statuses.count("completed"),
            "total": len(weights),
            "failed": statuses.count("failed") + statuses.count("cancelled"),
        }
