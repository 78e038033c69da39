"""What is sent, and when: without a server, by a clock that the tests hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statuswire import outbox as module
from statuswire.items import KEY_LIFE_US, Answer, Item, Refusal, State, sendable
from statuswire.outbox import Outbox

TAKEN = Answer({}, 0, ())
US = 1_700_000_000_000_000


def box(random: float = 1.0, interval: float = 0.2) -> Outbox:
    return Outbox(lambda: random, interval)


def end(out: Outbox, state: State, key: str = "k") -> Item:
    item = out.put_end(state, key, US, b'{"jobId":"%s"}' % state.job_id.encode(), None)
    assert item is not None
    return item


def said(items: list[Item]) -> list[tuple[str, Any]]:
    return [(item.state.job_id, "end" if item.is_end else item.fields) for item in items]


def test_news_is_sent_at_once_and_then_now_and_then() -> None:
    out = box()
    state = out.hold("a", None, {}, 0)
    assert out.due() is None
    assert out.put(state, {"progress": 1})
    assert said(out.take(10, US)) == [("a", {"progress": 1})]
    assert out.put(state, {"progress": 2})
    assert not out.put(state, {"progress": 3, "stage": "x"})
    out.done(TAKEN, 10.01)
    assert out.due() == pytest.approx(10.2)
    assert out.take(10.1, US) == []
    assert said(out.take(10.2, US)) == [("a", {"progress": 3, "stage": "x"})]


def test_an_end_does_not_wait_and_has_all_that_was_not_answered() -> None:
    out = box()
    state = out.hold("a", None, {"userId": "u", "status": "processing"}, 0)
    out.put(state, {"stage": "flying", "progress": 1})
    out.take(10, US)
    out.put(state, {"progress": 2})
    assert out.final_fields(state, {"status": "completed"}) == {
        "userId": "u",
        "status": "completed",
        "stage": "flying",
        "progress": 2,
    }
    end(out, state)
    out.done(TAKEN, 10)
    assert said(out.take(10.001, US)) == [("a", "end")]
    out.done(TAKEN, 10)
    assert out.final_fields(state, {"status": "failed"}) == {"status": "failed"}
    assert out.ends == 0


def test_parents_stay_before_their_parts() -> None:
    out = box()
    parent, part = out.hold("p", None, {}, 0), out.hold("c", None, {}, 0)
    out.put(parent, {"n": 1})
    out.put(part, {"n": 1})
    out.take(0, US)
    out.put(part, {"n": 2})
    out.put(parent, {"n": 2})
    out.failed(0, None)
    out.hurry()
    assert said(out.take(1, US)) == [("p", {"n": 2}), ("c", {"n": 2})]


def test_what_follows_an_end_is_not_mixed_with_what_came_before_it() -> None:
    out = box()
    state = out.hold("a", None, {}, 0)
    out.put(state, {"n": 1})
    out.take(0, US)
    end(out, state)
    out.put(state, {"n": 3})
    out.failed(0, None)
    out.hurry()
    assert said(out.take(1, US)) == [("a", {"n": 1}), ("a", "end"), ("a", {"n": 3})]


def test_a_server_that_is_away_is_asked_less_and_less_often() -> None:
    out = box(random=1.0)
    state = out.hold("a", None, {}, 0)
    out.put(state, {"n": 1})
    now, waits = 0.0, []
    for _ in range(10):
        assert out.take(now, US)
        out.failed(now, None)
        due = out.due()
        assert due is not None
        waits.append(due - now)
        now = due
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    out.take(now, US)
    out.failed(now, 100)
    assert out.due() == now + 30 + 100
    out.hurry()
    assert out.due() == now + 100
    now += 100
    out.take(now, US)
    out.failed(now, 1e9)
    assert out.due() == now + 30 + module.MAX_ASKED_DELAY
    assert box(random=0.0).due() is None


def test_a_refusal_that_passes_is_tried_again_and_others_are_not() -> None:
    out = box()
    states = [out.hold(name, None, {}, 0) for name in "abc"]
    for state in states:
        out.put(state, {"n": 1})
    out.take(0, US)
    outcome = out.done(Answer({0: Refusal("overloaded", "x"), 2: Refusal("job_ended", "y")}, 0, ()), 0)
    assert [item.state.job_id for item in outcome.done] == ["b", "c"]
    assert [(item.state.job_id, refusal.code) for item, refusal in outcome.refused] == [("c", "job_ended")]
    assert [state.accepted for state in states] == [False, True, False]
    assert states[2].refused == Refusal("job_ended", "y")
    due = out.due()
    assert due is not None
    assert due > 0
    assert said(out.take(due, US)) == [("a", {"n": 1})]


def test_a_batch_that_is_refused_whole_is_searched_for_what_it_was() -> None:
    out = box()
    names = [f"{number}" for number in range(37)]
    for name in names:
        out.put(out.hold(name, None, {}, 0), {"n": name})
    requests, taken, refused = 0, [], []
    while out.due() is not None:
        requests += 1
        items = out.take(requests, US)
        if any(item.state.job_id == "23" for item in items):
            refused += out.too_much(Refusal("malformed_json", "x")).refused
        else:
            taken += [item.state.job_id for item in items]
            out.done(TAKEN, 0)
    assert taken == [name for name in names if name != "23"]
    assert [item.state.job_id for item, _ in refused] == ["23"]
    assert requests < 16


def test_an_end_whose_contents_are_refused_is_sent_without_them_once() -> None:
    out = box()
    item = end(out, out.hold("a", None, {}, 0))
    unfit = Answer({0: Refusal("invalid_field", "result")}, 0, ())
    out.take(0, US)
    assert [one for one, _ in out.done(unfit, 0).unfit] == [item]
    assert out.take(0, US) == [item]
    assert b'"eventId":"k-bare"' in sendable(item, b'{"jobId":"a"}', US)
    assert out.done(unfit, 0).done == [item]
    assert out.due() is None


def test_order_by_seq_is_given_up_where_another_clock_is_ahead() -> None:
    out = box()
    state = out.hold("a", None, {}, 0)
    out.put(state, {"n": 1})
    (item,) = out.take(0, US)
    assert sendable(item, b'{"jobId":"a"}', US) == b'{"jobId":"a","seq":%d}' % US
    out.failed(0, None)
    (item,) = out.take(100, US)
    assert item.seq == US + 1
    out.done(Answer({}, 1, ()), 100)  # it had arrived the first time: no surprise
    assert state.ordered
    out.put(state, {"n": 2})
    out.take(200, US)
    out.done(Answer({}, 1, ()), 200)
    assert not state.ordered
    out.put(state, {"n": 3})
    (item,) = out.take(300, US)
    assert sendable(item, b'{"jobId":"a"}', US) == b'{"jobId":"a"}'


def test_a_late_end_says_what_it_is_newer_than() -> None:
    out = box()
    item = end(out, out.hold("a", None, {}, 0))
    assert sendable(item, b'{"jobId":"a"}', US) == b'{"jobId":"a","eventId":"k"}'
    late = sendable(item, b'{"jobId":"a"}', US + KEY_LIFE_US + 1)
    assert late == b'{"jobId":"a","eventId":"k-late","seq":%d}' % US


def test_leases_are_renewed_at_a_third_unless_something_was_said() -> None:
    out = box()
    state = out.hold("a", None, {}, 0)
    out.renew(state, 30)
    assert out.due() == 10
    assert out.take(9, US) == []
    assert said(out.take(10, US)) == [("a", {"ttl": 30})]
    out.done(TAKEN, 10.5)
    assert out.due() == 20.5
    out.put(state, {"n": 1})
    out.take(15, US)
    out.done(TAKEN, 15)
    assert out.due() == 25
    out.release(state)
    assert out.due() is None


def test_cancel_requests_reach_all_handles_of_a_job() -> None:
    out = box()
    one, two = out.hold("a", None, {}, 0), out.hold("a", 2, {}, 0)
    other = out.hold("b", None, {}, 0)
    out.put(one, {"n": 1})
    out.take(0, US)
    out.done(Answer({}, 0, ["a"]), 0)
    assert (one.cancel_requested, two.cancel_requested, other.cancel_requested) == (True, True, False)


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_WAITING", 3), ("MAX_ENDS", 2), ("MAX_NOTICES", 1), ("MAX_HELD", 20)):
        monkeypatch.setattr(module, name, value)
    out = box()
    for number in range(5):
        out.put(out.hold(f"{number}", None, {}, 0), {"n": number})
    assert out.put_end(out.state("e", None, 0), "k", US, b"x" * 21, None) is None
    assert out.put_end(out.state("e", None, 0), "k", US, b"x" * 20, None) is not None
    assert out.put_end(out.state("f", None, 0), "k", US, b"x", None) is None
    assert out.put_notice("k", b"{}")
    assert not out.put_notice("k", b"{}")
    assert out.dropped == 5
    items = out.take(0, US)
    assert [item.state.job_id for item in items] == ["2", "3", "4", "e"]
    out.done(TAKEN, 0)
    assert out.put_end(out.state("g", None, 0), "k", US, b"x" * 20, None) is not None


def test_what_does_not_fit_into_one_request_goes_into_the_next() -> None:
    out = box()
    for name in "abc":
        out.put(out.hold(name, None, {}, 0), {"n": 1})
    items = out.take(0, US)
    out.give_back(items[1:])
    out.put(items[2].state, {"n": 2})
    out.done(TAKEN, 0)
    items = out.take(0, US)
    assert said(items) == [("b", {"n": 1}), ("c", {"n": 2})]
    assert [item.tries for item in items] == [1, 1]


JOBS = st.sampled_from("ab")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), JOBS),
        st.tuples(st.just("end"), JOBS),
        st.tuples(st.sampled_from(["take", "done", "failed", "partly", "lost"]), st.just("")),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_the_newest_arrives_and_every_end_once(steps: list[tuple[str, str]]) -> None:
    """A server that may be away, busy or mute, against what a worker said."""
    out = box(random=0.0)
    server: dict[str, int] = {}
    ends: list[str] = []
    newest: dict[str, int] = {}
    flying: list[Item] = []

    def receive(items: list[Item]) -> None:
        for item in items:
            if item.is_end:
                if item.event_id not in ends:
                    ends.append(item.event_id)
            elif item.seq > server.get(f"seq {item.state.job_id}", 0):
                server[f"seq {item.state.job_id}"] = item.seq
                server[item.state.job_id] = item.fields["n"]

    expected: list[str] = []
    closing = [("done", ""), ("take", ""), ("done", ""), ("take", ""), ("done", "")]
    for number, (step, name) in enumerate([*steps, *closing], 1):
        if step == "put":
            newest[name] = number
            out.put(out.hold(name, None, {}, 0), {"n": number})
        elif step == "end":
            state = out.hold(name, None, {}, 0)
            newest.pop(name, None)
            server.pop(name, None)
            end(out, state, f"{number}")
            expected.append(f"{number}")
        elif step == "take" and not flying:
            out.hurry()
            flying = out.take(number, number)
        elif flying:
            if step in ("done", "lost"):
                receive(flying)
            if step == "done":
                out.done(TAKEN, number)
            elif step == "partly":
                receive(flying[1:])
                out.done(Answer({0: Refusal("overloaded", "x")}, 0, ()), number)
            elif step in ("failed", "lost"):
                out.failed(number, None)
            if step not in ("take", "put", "end"):
                flying = []
    assert sorted(ends) == sorted(expected)
    assert {name: server.get(name) for name in newest} == newest
    assert out.ends == 0
    assert out.is_settled(out.ticket)
