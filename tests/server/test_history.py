"""The ring of shown updates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.position import Position
from protocol.update import Update
from server.history import ENTRY_OVERHEAD, History
from server.turns import at_once


def entry(offset: int, *, at_ms: int = 0, job: str = "j", user: str = "u", size: int = 10) -> Update:
    return Update(offset, at_ms, "status_update", job, user, None, "queued", 1, b"x" * size, False, False)


def ring(max_updates: int = 1000, max_age: float = 1e6, max_bytes: int = 10**9, last: int = 0) -> History:
    return History("e", max_updates=max_updates, max_age=max_age, max_bytes=max_bytes, last=last)


def offsets(updates: list[Update]) -> list[int]:
    return [update.offset for update in updates]


def test_an_empty_ring() -> None:
    history = ring()
    assert (history.first, history.last, len(history)) == (1, 0, 0)
    assert history.everything(0) == history.of_job("j", 0) == history.of_user("u", 0) == []
    assert history.offset_at(0) == 0
    assert history.reaches(Position("e", 0))
    assert not history.reaches(Position("e", 1))
    assert not history.reaches(Position("other", 0))


def test_reading_by_job_by_user_and_all() -> None:
    history = ring()
    for offset, (job, user) in enumerate([("a", "u"), ("b", "u"), ("a", "u"), ("c", "v")], 1):
        history.append(entry(offset, job=job, user=user))
    assert offsets(history.of_job("a", 0)) == [1, 3]
    assert offsets(history.of_job("a", 1)) == [3]
    assert offsets(history.of_job("a", 3)) == []
    assert offsets(history.of_user("u", 1)) == [2, 3]
    assert offsets(history.everything(2)) == [3, 4]
    assert offsets(history.everything(-5)) == [1, 2, 3, 4]
    assert offsets(history.everything(99)) == []


def test_bounded_by_count() -> None:
    history = ring(max_updates=3)
    for offset in range(1, 6):
        history.append(entry(offset))
    assert (history.first, history.last, len(history)) == (3, 5, 3)
    assert offsets(history.of_job("j", 0)) == [3, 4, 5]
    assert not history.reaches(Position("e", 1))
    assert history.reaches(Position("e", 2))
    assert history.reaches(Position("e", 5))
    assert not history.reaches(Position("e", 6))


def test_bounded_by_bytes() -> None:
    history = ring(max_bytes=2 * (ENTRY_OVERHEAD + 10))
    for offset in range(1, 4):
        history.append(entry(offset))
    assert offsets(history.everything(0)) == [2, 3]
    history.append(entry(4, size=10**6))
    assert (history.first, history.last, history.bytes) == (5, 4, 0)


def test_bounded_by_age_and_lost_when_empty() -> None:
    history = ring(max_age=10)
    history.append(entry(1, at_ms=1000))
    history.append(entry(2, at_ms=5000))
    history.trim(12_000)
    assert offsets(history.everything(0)) == [2]
    history.trim(60_000)
    assert (history.first, history.last, len(history)) == (3, 2, 0)
    assert history.reaches(Position("e", 2))
    assert not history.reaches(Position("e", 1))
    assert history.offset_at(0) == 2
    history.append(entry(3, at_ms=60_000))
    assert offsets(history.of_user("u", 0)) == [3]


def test_evicted_jobs_and_users_leave_nothing() -> None:
    history = ring(max_updates=1)
    for offset in range(1, 5000):
        history.append(entry(offset, job=f"j{offset}", user=f"u{offset}"))
    assert (len(history._newest_in_job), len(history._newest_of_user)) == (1, 1)
    assert len(history._entries) <= 1025


def test_since_a_time() -> None:
    history = ring(max_updates=4)
    for offset, at_ms in enumerate([10, 20, 20, 30, 40], 1):
        history.append(entry(offset, at_ms=at_ms))
    assert [history.offset_at(at_ms) for at_ms in (0, 20, 21, 30, 40, 41)] == [1, 1, 3, 3, 4, 5]


def test_a_gap_is_a_mistake() -> None:
    history = ring(last=7)
    assert (history.first, history.last) == (8, 7)
    with pytest.raises(ValueError, match="no gaps"):
        history.append(entry(9))
    history.append(entry(8))


def test_restart_is_another_incarnation() -> None:
    history = ring()
    history.append(entry(1))
    history.restart("f", 10)
    assert (history.epoch, history.first, history.last, history.everything(0)) == ("f", 11, 10, [])
    assert not history.reaches(Position("e", 10))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3), st.integers(0, 400)), max_size=60),
    st.integers(1, 20),
    st.integers(0, 70),
)
def test_it_answers_like_a_plain_list(steps: list[tuple[int, int, int, int]], bound: int, after: int) -> None:
    history = ring(max_updates=bound, max_age=0.02, max_bytes=5000)
    kept: list[Update] = []
    now = 0
    for offset, (job, user, waited, size) in enumerate(steps, 1):
        now += waited
        update = entry(offset, at_ms=now, job=f"j{job}", user=f"u{user}", size=size)
        history.append(update)
        kept.append(update)
        while kept and (
            len(kept) > bound or kept[0].at_ms < now - 20 or sum(len(u.body) + ENTRY_OVERHEAD for u in kept) > 5000
        ):
            kept.pop(0)
    newer = [update for update in kept if update.offset > after]
    assert history.everything(after) == newer
    for number in range(4):
        assert history.of_job(f"j{number}", after) == [update for update in newer if update.job_id == f"j{number}"]
        assert history.of_user(f"u{number}", after) == [update for update in newer if update.user_id == f"u{number}"]
        for owner in ("u0", "u1", "u2"):
            owned = [update for update in kept if (update.job_id, update.user_id) == (f"j{number}", owner)]
            found = history.of_owned_job(f"j{number}", owner, after)
            assert found == [update for update in owned if update.offset > after]
            assert history.last_of_job(f"j{number}", owner) == (owned[-1] if owned else None)
    assert history.first == (kept[0].offset if kept else history.last + 1)
    assert set(history._newest_in_job) == {update.job_id for update in kept}
    assert {offset for offsets in history._passed_on.values() for offset in offsets} <= {one.offset for one in kept}


def test_the_last_of_a_job_is_looked_for_by_owner() -> None:
    history = History("e", max_updates=100, max_age=1e9, max_bytes=1 << 30)
    owners = ["alice", "alice", "bob"]
    for offset, owner in enumerate(owners, 1):
        history.append(
            Update(offset, offset, "status_update", "j", owner, None, "processing", offset, b"{}", False, False)
        )

    def last(owner: str | None = None) -> int | None:
        found = history.last_of_job("j", owner)
        return None if found is None else found.offset

    assert (last(), last("bob"), last("alice"), last("carol")) == (3, 3, 2, None)
    history.max_updates = 1
    history.trim(3)
    assert (last(), last("alice")) == (3, None)
    assert history.last_of_job("other") is None


def test_what_others_did_with_an_id_costs_its_next_owner_nothing() -> None:
    history = ring(max_updates=10_000)
    history.append(entry(1, job="j", user="bob"))
    for offset in range(2, 1002):
        history.append(entry(offset, job="j", user="alice"))
    history._before_in_job = [
        0 if 1 < offset < 1001 else before for offset, before in enumerate(history._before_in_job, 1)
    ]
    # Alice's chain is cut: whoever walks it does not arrive.
    assert offsets(history.of_owned_job("j", "bob", 0)) == [1]
    assert history.last_of_job("j", "bob") == history.everything(0)[0]
    assert history.last_of_job("j", "carol") is None


# A part of the log


def test_skipped_places_are_filled_later() -> None:
    history = ring()
    history.append(entry(1, job="a"))
    history.skip(3)
    history.append(entry(4, job="a"))
    history.skip(4)  # not ahead: nothing happens
    history.skip(6)
    assert (history.first, history.last, len(history)) == (1, 6, 6)
    assert offsets(history.everything(0)) == [1, 4]
    assert history.reaches(Position("e", 6))
    at_once(history.fill([entry(2, job="b"), entry(3, job="a", user="v"), entry(5, job="b")]))
    assert offsets(history.everything(0)) == [1, 2, 3, 4, 5]
    assert offsets(history.of_job("a", 0)) == [1, 3, 4]
    assert offsets(history.of_user("u", 1)) == [2, 4, 5]
    assert history.last_of_job("a", "v") == history.everything(2)[0]
    assert offsets(history.of_owned_job("a", "u", 0)) == [1, 4]
    assert history.bytes == 5 * (10 + ENTRY_OVERHEAD)
    history.append(entry(7, job="b"))
    assert offsets(history.of_job("b", 2)) == [5, 7]


def test_skipped_places_count_and_go_with_what_is_behind_them() -> None:
    history = ring(max_updates=5, max_age=10)
    history.append(entry(1))
    history.skip(4)
    history.append(entry(5))
    history.skip(6)
    assert (history.first, offsets(history.everything(0))) == (2, [5])
    history.append(entry(7, at_ms=10_001))
    assert (history.first, offsets(history.everything(0))) == (6, [7])
    at_once(history.fill([entry(2), entry(5)]))  # trimmed: they have no place any more
    assert offsets(history.everything(0)) == [7]
    history.skip(100)
    assert (history.first, history.last, len(history), history.bytes) == (101, 100, 0, 0)


def test_what_nobody_can_resume_in_front_of_is_forgotten() -> None:
    history = ring(max_updates=50)
    history.append(entry(1))
    history.skip(4)
    history.append(entry(5))
    history.skip(7)
    for offset, first, left in [(0, 1, [1, 5]), (1, 2, [5]), (3, 4, [5]), (6, 7, []), (99, 8, [])]:
        history.forget(offset)
        assert (history.first, offsets(history.everything(0))) == (first, left)
    assert (history.last, history.bytes, history.max_updates) == (7, 0, 50)
    history.append(entry(8))
    assert offsets(history.everything(0)) == [8]


def test_a_time_in_a_part_of_the_log() -> None:
    history = ring()
    history.skip(2)
    history.append(entry(3, at_ms=100))
    history.skip(5)
    history.append(entry(6, at_ms=200))
    history.skip(7)
    assert [history.offset_at(at) for at in (0, 100, 101, 200, 201)] == [2, 2, 5, 5, 7]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.integers(0, 3)), max_size=60),
    st.integers(1, 12),
    st.integers(0, 60),
)
def test_filling_later_is_the_same_as_appending(
    log: list[tuple[int, str, int]], max_updates: int, filled_at: int
) -> None:
    """One ring has everything at once, the other skips job a at first and gets it later."""
    whole, part = ring(max_updates), ring(max_updates)
    missing = []
    at_ms = 0
    for offset, (step, job, size) in enumerate(log, 1):
        at_ms += step
        update = entry(offset, at_ms=at_ms, job=job, user=job, size=size)
        whole.append(update)
        if job == "a" and offset <= filled_at:
            missing.append(update)
            continue
        if missing:
            part.skip(offset - 1)
            at_once(part.fill(missing))
            missing = []
        part.skip(offset - 1)
        part.append(update)
    part.skip(whole.last)
    at_once(part.fill(missing))
    kept = [update for update in whole.everything(0) if update.offset >= part.first]
    assert part.everything(0) == kept
    assert part.first >= whole.first or part.last == whole.last
    for job in "ab":
        assert part.of_job(job, 0) == [update for update in kept if update.job_id == job]
        assert part.of_user(job, 0) == part.of_job(job, 0)
    assert part.bytes == sum(len(update.body) + ENTRY_OVERHEAD for update in kept)
