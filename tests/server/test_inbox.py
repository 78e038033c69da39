"""What is stored for users: added, acknowledged, too old, too much."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.notice import notice_entry
from protocol.update import Update
from server.inbox import Inboxes, Place


def notice(offset: int, *users: str, at_ms: int = 0, size: int = 10) -> Update:
    return notice_entry(offset, at_ms, "e", tuple(f"user/{user}" for user in users), b"x" * size)


def offsets(inboxes: Inboxes, user: str) -> list[int]:
    return [kept.offset for kept in inboxes.of_user(user)]


def test_each_user_has_its_own_and_one_text_is_kept_for_all() -> None:
    inboxes = Inboxes()
    assert inboxes.add(notice(1, "a", "b")) == []
    assert inboxes.add(notice(2, "a")) == []
    assert (offsets(inboxes, "a"), offsets(inboxes, "b"), offsets(inboxes, "c")) == ([1, 2], [1], [])
    assert (inboxes.places, inboxes.bytes) == (3, 20)
    assert offsets(inboxes, "a") == [kept.offset for kept in inboxes.of_user("a", 0)]
    assert [kept.offset for kept in inboxes.of_user("a", 1)] == [2]
    assert inboxes.up_to("a", 1) == [Place("a", 1)]
    inboxes.remove(inboxes.up_to("a", 2))
    assert (inboxes.places, inboxes.bytes) == (1, 10)
    inboxes.remove([Place("a", 1), Place("b", 1), Place("b", 1), Place("nobody", 9)])
    assert (inboxes.places, inboxes.bytes) == (0, 0)


def test_a_user_keeps_the_newest() -> None:
    inboxes = Inboxes(max_per_user=3)
    gone = [place for offset in range(1, 6) for place in inboxes.add(notice(offset, "a", "b"))]
    assert gone == [Place("a", 1), Place("b", 1), Place("a", 2), Place("b", 2)]
    assert offsets(inboxes, "a") == [3, 4, 5]
    assert inboxes.bytes == 30


def test_the_oldest_go_while_there_is_too_much_in_all() -> None:
    inboxes = Inboxes(max_places=4, max_bytes=100)
    inboxes.add(notice(1, "a", "b"))
    inboxes.add(notice(2, "c"))
    assert inboxes.add(notice(3, "d", "e")) == [Place("a", 1), Place("b", 1)]
    assert inboxes.add(notice(4, "f", size=95)) == [Place("c", 2), Place("d", 3), Place("e", 3)]
    assert inboxes.add(notice(5, "g", size=500)) == [Place("f", 4), Place("g", 5)]
    assert (inboxes.places, inboxes.bytes) == (0, 0)


def test_what_is_too_old_goes() -> None:
    inboxes = Inboxes(kept_s=10)
    inboxes.add(notice(1, "a", at_ms=1000))
    inboxes.add(notice(2, "a", "b", at_ms=2000))
    assert inboxes.trim(10_999) == []
    assert inboxes.trim(11_000) == [Place("a", 1)]
    assert inboxes.trim(99_000) == [Place("a", 2), Place("b", 2)]
    assert (inboxes.places, inboxes.bytes) == (0, 0)


def test_what_a_store_remembers() -> None:
    inboxes = Inboxes(max_per_user=2)
    inboxes.add(notice(9, "old"))
    gone = inboxes.load(
        [(notice(1, "a", "b"), ["b"]), (notice(2, "a"), ["a"]), (notice(3, "b"), ["b"]), (notice(4, "b"), ["b"])]
    )
    assert gone == [Place("b", 1)]
    assert (offsets(inboxes, "a"), offsets(inboxes, "b"), offsets(inboxes, "old")) == ([2], [3, 4], [])


USERS = st.sampled_from("abc")


@given(
    st.lists(
        st.tuples(st.just("add"), st.lists(USERS, min_size=1, max_size=3, unique=True), st.integers(1, 40))
        | st.tuples(st.just("ack"), USERS, st.integers(0, 40))
        | st.tuples(st.just("trim"), st.just(""), st.integers(0, 60)),
        max_size=40,
    )
)
def test_counts_hold_whatever_happens(steps: list[tuple[str, list[str] | str, int]]) -> None:
    inboxes = Inboxes(kept_s=0.02, max_per_user=4, max_places=8, max_bytes=120)
    expected: dict[Place, Update] = {}
    offset = now_ms = 0
    for kind, who, number in steps:
        if kind == "add":
            offset += 1
            now_ms = max(now_ms, offset)
            entry = notice(offset, *who, at_ms=now_ms, size=number)
            gone = inboxes.add(entry)
            expected.update({Place(user, offset): entry for user in who})
        elif kind == "ack":
            assert isinstance(who, str)
            gone = inboxes.up_to(who, number)
            inboxes.remove(gone)
        else:
            now_ms = max(now_ms, number)
            gone = inboxes.trim(now_ms)
        for place in gone:
            del expected[place]
        for user in "abc":
            assert offsets(inboxes, user) == [place.offset for place in expected if place.user == user]
            assert len(offsets(inboxes, user)) <= 4
        assert inboxes.places == len(expected) <= 8
        assert inboxes.bytes == sum({entry.offset: len(entry.body) for entry in expected.values()}.values()) <= 120
