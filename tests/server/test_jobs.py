"""The shown records."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.update import Job, Private, Update
from server import jobs as jobs_module
from server.jobs import Jobs, Page
from server.turns import at_once


def job(
    job_id: str, created: int, *, user: str = "u", status: str = "queued", kind: str | None = None, version: int = 1
) -> Job:
    ended = status in ("completed", "failed")
    update = Update(created + version - 1, 0, "status_update", job_id, user, kind, status, version, b"{}", ended, False)
    return Job(update, created, Private())


def show(jobs: Jobs, *shown: Job) -> None:
    for each in shown:
        jobs.show(each.latest, each)


def ids(found: list[Job]) -> list[str]:
    return [each.latest.job_id for each in found]


def filled() -> Jobs:
    jobs = Jobs(max_jobs=10)
    show(
        jobs,
        job("a", 1, kind="x"),
        job("b", 2, user="v", status="completed"),
        job("c", 3, kind="y", status="failed"),
        job("d", 5, kind="x", status="completed"),
    )
    return jobs


def test_by_id_and_by_owner() -> None:
    jobs = filled()
    assert jobs.get("a") is jobs.jobs["a"]
    assert jobs.get("z") is None
    assert {user: list(owned) for user, owned in jobs.by_user.items()} == {"u": ["a", "c", "d"], "v": ["b"]}
    jobs.show(jobs.jobs["b"].latest, None)
    jobs.forget("b")
    assert (list(jobs.by_user), len(jobs)) == (["u"], 3)
    newer = job("a", 1, version=7)
    show(jobs, newer)
    assert jobs.by_user["u"]["a"] is jobs.get("a") is newer
    assert list(jobs.by_user["u"]) == ["a", "c", "d"]


def test_how_many_there_are_of_each_status() -> None:
    jobs = filled()

    def counted() -> dict[str, int]:
        return {status: count for status, count in jobs.by_status.items() if count}

    assert counted() == {"queued": 1, "completed": 2, "failed": 1}
    show(jobs, job("a", 1, version=2), job("a", 1, version=3, status="processing"))
    assert counted() == {"processing": 1, "completed": 2, "failed": 1}
    show(jobs, job("b", 9))  # another job of that id
    jobs.forget("d")
    assert counted() == {"processing": 1, "queued": 1, "failed": 1}
    jobs.clear()
    assert counted() == {}


def page(jobs: Jobs, **asked: Any) -> Page:
    return at_once(jobs.page(**asked))


def test_pages_are_newest_first() -> None:
    jobs = filled()
    found, after = page(jobs, limit=2)
    assert (ids(found), after) == (["d", "c"], 3)
    found, after = page(jobs, limit=2, after=after)
    assert (ids(found), after) == (["b", "a"], None)
    assert page(jobs, limit=2, after=1) == ([], None)
    assert ids(page(jobs, limit=9, user_id="u")[0]) == ["d", "c", "a"]
    assert ids(page(jobs, limit=9, user_id="u", after=5)[0]) == ["c", "a"]
    assert page(jobs, limit=9, user_id="nobody") == ([], None)


def test_pages_can_be_narrowed() -> None:
    jobs = filled()
    assert ids(page(jobs, limit=9, status={"completed"})[0]) == ["d", "b"]
    assert ids(page(jobs, limit=9, kind={"x"})[0]) == ["d", "a"]
    assert ids(page(jobs, limit=9, kind={"x"}, status={"queued"})[0]) == ["a"]
    found, after = page(jobs, limit=1, status={"completed"})
    assert (ids(found), after) == (["d"], 5)
    assert page(jobs, limit=1, status={"completed"}, after=after)[1] is None


@pytest.mark.parametrize("user_id", [None, "u"])
def test_where_many_are_looked_through_others_have_turns_and_the_page_is_of_one_moment(
    user_id: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "PORTION", 3)
    jobs = Jobs(max_jobs=100)
    for number in range(1, 11):
        show(jobs, job(f"j{number}", number, status="queued" if number in (1, 2, 9) else "failed"))
    steps = jobs.page(user_id=user_id, status={"queued"}, limit=9)
    assert next(steps) is None
    show(jobs, job("j2", 2, version=2, status="failed"), job("j5", 5, version=2), job("j11", 11))
    jobs.forget("j1")
    assert next(steps) is None
    found = at_once(steps)
    assert ids(found.jobs) == ["j9", "j2", "j1"]
    assert found.following is None
    # A page that is full before is there at once.
    with pytest.raises(StopIteration) as caught:
        next(jobs.page(user_id=user_id, limit=2))
    assert ids(caught.value.value.jobs) == ["j11", "j10"]
    assert ids(page(jobs, user_id=user_id, limit=9, after=4).jobs) == ["j3", "j2"]


def test_a_new_incarnation_is_a_new_job() -> None:
    jobs = filled()
    show(jobs, job("a", 9, user="w"))
    assert ids(page(jobs, limit=9)[0]) == ["a", "d", "c", "b"]
    assert "a" not in jobs.by_user["u"]
    assert list(jobs.by_user["w"]) == ["a"]


def test_the_oldest_ended_come_first() -> None:
    jobs = filled()
    show(jobs, job("c", 3, version=8))  # reopened
    show(jobs, job("c", 3, version=9, status="failed"))  # and ended again, last
    first = jobs.take_oldest_ended()
    second = jobs.take_oldest_ended()
    assert first is not None
    assert second is not None
    assert ids([first, second]) == ["b", "d"]
    jobs.give_back(second)
    jobs.give_back(first)
    taken = [jobs.take_oldest_ended() for _ in range(4)]
    assert [each and each.latest.job_id for each in taken] == ["b", "d", "c", None]


def test_loading_orders_the_ended_by_their_end() -> None:
    jobs = Jobs(max_jobs=10)
    at_once(jobs.load([job("a", 1, version=9, status="failed"), job("b", 2, status="failed"), job("c", 3)]))
    assert jobs.take_oldest_ended() is jobs.get("b")
    assert jobs.take_oldest_ended() is jobs.get("a")


def test_nothing_grows_with_churn() -> None:
    jobs = Jobs(max_jobs=10)
    for number in range(1, 2000):
        show(jobs, job("same", 1, version=2 * number), job("same", 1, version=2 * number + 1, status="failed"))
        each = job(f"j{number}", number + 1)
        show(jobs, each)
        jobs.forget(f"j{number}")
    assert (len(jobs._ended), len(jobs._ids), len(jobs._created)) <= (70, 70, 70)
    assert ids(page(jobs, limit=9)[0]) == ["same"]


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=200), st.integers(1, 5), st.integers(1, 9))
def test_pages_join_to_the_whole(steps: list[tuple[int, bool]], limit: int, portion: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_module, "PORTION", portion)
        join_pages(steps, limit)


def join_pages(steps: list[tuple[int, bool]], limit: int) -> None:
    jobs = Jobs(max_jobs=100)
    alive: dict[str, int] = {}
    for created, (number, keep) in enumerate(steps, 1):
        name = f"j{number}"
        if keep and name not in alive:
            show(jobs, job(name, created, user=f"u{number % 2}"))
            alive[name] = created
        elif not keep:
            jobs.forget(name)
            alive.pop(name, None)
    wanted = sorted(alive, key=lambda name: -alive[name])
    joined: list[str] = []
    after = None
    while True:
        found, after = page(jobs, limit=limit, after=after)
        joined += ids(found)
        if after is None:
            break
    assert joined == wanted
    assert sum(jobs.by_status.values()) == len(wanted)
    assert sorted(jobs.by_user) == sorted({f"u{int(name[1:]) % 2}" for name in alive})
