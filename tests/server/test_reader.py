"""One push reader from the inside, over a real socket: what it holds, when it lets go, where it says it stands."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from protocol.watch import ANY, Filter
from protocol.wire import Framing, wire_form
from server import reader as reader_module
from server.channel import Want
from server.history import History
from server.hub import Hub
from server.wheel import Wheel
from tests.server.reader_bench import FORM, Bench, Probe, ids
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from _typeshed import TraceFunction


@pytest.fixture
def bench(nursery: trio.Nursery) -> Iterator[Bench]:
    bench = Bench(nursery)
    yield bench
    bench.close()


NAMES = st.lists(st.integers(0, 5).map("j/{}".format), max_size=4, unique=True)


WANTS = st.builds(
    Want, st.sampled_from([ANY, Filter(kinds=frozenset({"k"}))]), st.sampled_from([FORM, wire_form(Framing.WEBSOCKET)])
)


@given(st.lists(st.tuples(NAMES, WANTS | st.none()), max_size=30))
async def test_only_what_is_wanted_alike_of_all_channels_goes_the_direct_way(
    steps: list[tuple[list[str], Want | None]],
) -> None:
    history = History("e", max_updates=1, max_age=1e9, max_bytes=1)
    hub = Hub(history)
    ours, peer = socket.socketpair()
    with ours, peer:
        nursery = cast("trio.Nursery", None)  # nothing is sent
        reader = Probe(ours, nursery, hub, Wheel(), FORM, backlog_bytes=1)
        for names, want in steps:
            if want is None:
                hub.detach(reader, names)
            else:
                hub.attach(reader, names, want)
            reader.wants_changed()
            wants = set(reader.wants.values())
            assert reader.direct == (
                len({want.form for want in wants}) < 2 and all(want.filter.is_any for want in wants)
            )
            if len(wants) == 1:
                assert reader.form is next(iter(wants)).form
            assert set(hub.channels) == set(reader.wants)


def opcodes(work: Callable[[], object]) -> int:
    """How much of the interpreter a piece of work takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> TraceFunction:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


async def test_one_more_channel_costs_the_same_however_many_there_are(bench: Bench) -> None:
    plain, filtered = Want(ANY, FORM), Want(Filter(kinds=frozenset({"k"})), FORM)

    def one_more() -> None:
        for want in (plain, filtered):
            bench.hub.attach(bench.reader, ["j/one"], want)
            bench.reader.wants_changed()
            bench.hub.detach(bench.reader, ["j/one"])
            bench.reader.wants_changed()

    costs = []
    for count in (10, 1000):
        bench.hub.attach(bench.reader, [f"j/{number}" for number in range(count)], plain)
        costs.append(opcodes(one_more))
    assert costs[0] == costs[1] > 0


async def test_what_the_hub_calls_never_waits(bench: Bench) -> None:
    reader = bench.reader
    with assert_no_checkpoints():
        bench.watch("j/a", "j/b")
        reader.post(b"data: {}\n\n", iter([b"data: {}\n\n"]))
        reader.catch_up()
        bench.put()
        reader.take(bench.history.everything(0))
        reader.log_lost()
        reader.cursor()
        reader.finish("closed")
        reader.broken()
    assert reader.ends == 1


async def test_order_is_kept_between_answers_and_updates(bench: Bench) -> None:
    reader = bench.reader
    bench.watch("j/a")
    for number in range(50):
        reader.post(FORM.message(b'{"answer":%d}' % number))
        if number % 2:
            bench.put()
            await wait_all_tasks_blocked()
    events = await bench.received("e:25")
    assert [event["answer"] for event in events if "answer" in event] == list(range(50))
    assert ids(events) == [str(offset) for offset in range(1, 26)]
    assert reader.direct


async def test_few_held_updates_are_all_given(bench: Bench) -> None:
    bench.watch("j/a", "j/b")
    bench.fill()
    await wait_all_tasks_blocked()
    assert not bench.reader.direct
    assert bench.reader.tail
    for _ in range(100):
        bench.put("a")
        bench.put("b")
    await wait_all_tasks_blocked()
    assert not bench.reader.conflating
    events = await bench.received("e:201")
    assert ids(events) == [str(offset) for offset in range(1, 202)]
    assert bench.reader.direct
    assert bench.reader.held_bytes == 0


async def test_many_held_updates_collapse_to_the_newest_and_every_ending(bench: Bench) -> None:
    bench.watch("u/u")
    bench.fill()
    await wait_all_tasks_blocked()
    ended = []
    for number in range(300):
        bench.put("a", size=500)
        bench.put("b", size=500)
        if number % 100 == 50:
            ended.append(bench.put("a", ended=True))
        await wait_all_tasks_blocked()
    reader = bench.reader
    assert reader.conflating
    assert reader.held is not None
    assert len(reader.held) == 5
    assert reader.held_bytes == sum(len(update.body) for update in reader.held.values())
    last = bench.history.last
    events = await bench.received(f"e:{last}")
    assert ids(events) == sorted({"1", *map(str, ended), str(last - 1), str(last)}, key=int)
    assert not reader.conflating
    assert reader.direct


async def test_updates_without_end_are_no_way_to_take_memory(bench: Bench) -> None:
    bench.watch("u/u")
    bench.fill()
    await wait_all_tasks_blocked()
    while not bench.reader.ended:
        bench.put("a", size=1000, ended=True)
        await wait_all_tasks_blocked()
        assert bench.reader.held_bytes <= bench.reader.backlog_bytes
    assert bench.reader.ended == "overflow"
    assert 95 <= bench.history.last <= 110
    assert not bench.reader.held
    bench.put()
    await wait_all_tasks_blocked()
    assert not bench.reader.held


async def test_a_filtered_batch_is_written_as_it_is_held(bench: Bench) -> None:
    """More than the backlog in one flush, for a reader that takes it all."""
    bench.reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10**6)
    bench.watch("u/u", filter=Filter(kinds=frozenset({"k"})))
    for _ in range(100):
        bench.put(size=1500, kind="k")
        bench.put(size=1500)
    events = await bench.received("e:199")
    assert ids(events) == [str(offset) for offset in range(1, 200, 2)]
    assert not bench.reader.ended


async def test_catch_up_gives_what_is_pending_before_the_flusher_does(bench: Bench) -> None:
    bench.watch("j/a")
    bench.put("a")
    bench.put("other")
    bench.put("a")
    bench.reader.catch_up()
    assert bench.reader.offset == 3
    bench.watch("j/other")
    bench.put("other")
    events = await bench.received("e:4")
    assert ids(events) == ["1", "3", "4"]


async def test_catch_up_lets_go_of_what_is_held_in_front_of_the_answer(bench: Bench) -> None:
    reader = bench.reader
    bench.watch("j/a")
    bench.fill()
    await wait_all_tasks_blocked()
    bench.put("a")
    bench.put("a")
    reader.catch_up()
    assert not reader.held
    reader.post(FORM.message(b'{"answer":1}', "e:3"))
    bench.put("a")
    events = await bench.received("e:4")
    assert [event.get("answer", event.get("cursor")) for event in events] == ["e:1", "e:2", "e:3", 1, "e:4"]


async def test_what_is_pending_and_trimmed_already_is_a_loss(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, max_updates=2)
    bench.watch("j/a")
    for _ in range(3):
        bench.put("a")
    bench.reader.catch_up()
    assert bench.reader.resets == 1
    await wait_all_tasks_blocked()
    events = await bench.received()
    assert [event["type"] for event in events] == ["reset"]
    # Others' updates that were trimmed are none.
    for _ in range(3):
        bench.put("b")
    await wait_all_tasks_blocked()
    bench.reader.catch_up()
    assert bench.reader.resets == 1
    bench.close()


async def test_what_was_unsubscribed_while_held_is_not_sent_and_holds_nothing_up(bench: Bench) -> None:
    reader = bench.reader
    bench.watch("j/a", "j/b")
    bench.fill()
    await wait_all_tasks_blocked()
    bench.put("b")
    await wait_all_tasks_blocked()
    bench.hub.detach(reader, ["j/b", "j/a"])
    bench.watch("j/c", "j/d")
    reader.catch_up()
    reader.post(FORM.message(b'{"answer":1}', "e:2"))
    events = await bench.received("e:2")
    assert [event.get("answer", event.get("jobId")) for event in events] == ["a", 1]
    assert reader.direct


async def test_empty_pieces_do_not_stop_the_queue(bench: Bench) -> None:
    bench.reader.post(b"", iter(()), b"", FORM.message(b'{"answer":1}', "e:0"))
    assert await bench.received("e:0") == [{"answer": 1, "cursor": "e:0"}]
    assert bench.reader.caught_up


async def test_a_large_answer_comes_piece_by_piece_with_turns_for_others(bench: Bench) -> None:
    bench.reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10**6)
    pieces = 0

    def answer() -> Iterator[bytes]:
        nonlocal pieces
        for number in range(100):
            pieces += 1
            yield FORM.message(b'{"part":%d,"x":"%b"}' % (number, b"x" * 10_000), f"e:{number}")

    bench.reader.post(answer())
    assert 0 < pieces < 50  # one turn is a quarter of a megabyte
    events = await bench.received("e:99")
    assert [event["part"] for event in events] == list(range(100))


async def test_the_cursor_stays_behind_what_is_held(bench: Bench) -> None:
    bench.watch("j/a")
    assert bench.reader.cursor() == "e:0"
    bench.put("b")
    assert bench.reader.cursor() == "e:1"
    bench.fill()
    bench.put("b")
    assert bench.reader.cursor() == "e:1"  # the one for it is pending
    await wait_all_tasks_blocked()
    bench.put("a")
    bench.put("b")
    bench.put("a")
    await wait_all_tasks_blocked()
    assert bench.reader.cursor() == "e:3"
    await bench.received("e:6")
    assert bench.reader.cursor() == "e:6"


async def test_an_urgent_update_overtakes_without_taking_the_cursor_along(bench: Bench) -> None:
    reader = bench.reader
    bench.watch("u/u")
    reader.min_interval_s = 1000.0
    reader.wants_changed()
    bench.put("a")
    await wait_all_tasks_blocked()
    bench.put("b")
    bench.put("c")
    bench.put("c", urgent=True)  # its own older one goes: nothing of a job comes after something newer
    bench.put("d", ended=True)
    await wait_all_tasks_blocked()
    events = await bench.received()
    assert [(event["jobId"], event["cursor"]) for event in events] == [("a", "e:1"), ("c", "e:1"), ("d", "e:1")]
    assert reader.held is not None
    assert [update.offset for update in reader.held.values()] == [2]
    assert reader.caught_up
    reader._interval_over()
    assert [(event["jobId"], event["cursor"]) for event in await bench.received()] == [("b", "e:5")]


async def test_a_peer_that_takes_nothing_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "send_timeout", 0.05)
    bench.watch("j/a")
    bench.fill()
    with trio.fail_after(PATIENCE_S):
        while not bench.reader.ended:
            await trio.lowlevel.checkpoint()
    assert bench.reader.ended == "broken"


async def test_a_cancelled_drain_has_sent_whole_bytes_only(bench: Bench) -> None:
    """Cancelled in the middle of a write: the rest is known exactly, so a goodbye can follow it."""
    reader = bench.reader
    bench.watch("j/a")
    async with trio.open_nursery() as inner:
        reader._nursery = inner
        bench.fill()
        await wait_all_tasks_blocked()
        assert reader._draining
        inner.cancel_scope.cancel()
    assert not reader._draining
    reader.finish("closing")
    bench.nursery.start_soon(reader.say_last, FORM.message(b'{"bye":1}', "e:9"), 5.0)
    events = await bench.received("e:9")
    assert [event.get("jobId", event.get("bye")) for event in events] == ["a", 1]


async def test_the_last_word_to_a_deaf_peer_has_a_deadline(bench: Bench) -> None:
    bench.watch("j/a")
    bench.fill()
    await wait_all_tasks_blocked()
    bench.reader.finish("closing")
    with trio.fail_after(PATIENCE_S):
        await bench.reader.say_last(b"bye", 0.05)


async def test_whoever_waits_for_the_drain_is_woken_by_its_end(bench: Bench) -> None:
    bench.watch("j/a")
    with assert_no_checkpoints():
        await bench.reader.wait_drained()
    bench.fill()
    await wait_all_tasks_blocked()
    done = False

    async def wait() -> None:
        nonlocal done
        await bench.reader.wait_drained()
        done = True

    bench.nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert not done
    await bench.received("e:1")
    assert done


async def test_the_last_named_job_finishes_the_reader_after_all_is_written(bench: Bench) -> None:
    reader = bench.reader
    bench.watch("j/a", "j/b")
    reader.open_jobs = {"a", "b"}
    bench.fill()
    await wait_all_tasks_blocked()
    bench.put("a", ended=True)
    bench.put("b", ended=True)
    await wait_all_tasks_blocked()
    assert not reader.ended
    assert ids(await bench.received("e:3")) == ["1", "2", "3"]
    assert (reader.ended, reader.ends) == ("finished", 1)


async def test_a_reopened_job_is_waited_for(bench: Bench) -> None:
    reader = bench.reader
    bench.watch("j/a")
    reader.open_jobs = {"a"}
    reader.again = {"a"}
    bench.put("a", ended=True)
    await wait_all_tasks_blocked()
    assert not reader.ended
    reader.again = set()
    bench.put("a", ended=True)
    await wait_all_tasks_blocked()
    assert reader.ended == "finished"


async def test_a_lost_log_voids_what_is_held_behind_what_is_on_its_way(bench: Bench) -> None:
    reader = bench.reader
    bench.watch("j/a")
    bench.fill()
    await wait_all_tasks_blocked()
    reader.post(FORM.message(b'{"answer":1}'))
    bench.put("a")
    await wait_all_tasks_blocked()
    bench.history.restart("f")
    bench.hub.log_lost()
    assert reader.cursor() == "f:0"
    bench.put("a")
    events = await bench.received("f:1")
    shown = [event.get("answer", event.get("cursor", event.get("type"))) for event in events]
    assert shown == ["e:1", 1, "reset", "f:1"]


async def test_a_lost_log_is_told_in_the_readers_own_turn(bench: Bench) -> None:
    """Of ten thousand readers each may have a snapshot to be made and sent."""
    bench.watch("j/a")
    bench.history.restart("f", 7)
    bench.hub.log_lost()
    with pytest.raises(BlockingIOError):
        bench.peer.recv(1)
    bench.put()
    assert not bench.reader.caught_up, "no heartbeat goes ahead of it, either"
    events = await bench.received("f:8")
    assert [event.get("type", event.get("jobId")) for event in events] == ["reset", "status_update"]


async def test_a_closed_peer_ends_the_reader(bench: Bench) -> None:
    bench.watch("j/a")
    bench.peer.close()
    bench.put("a")
    await wait_all_tasks_blocked()
    assert bench.reader.ended == "broken"
    bench.put("a")
    await wait_all_tasks_blocked()
    assert bench.reader.ends == 1


async def test_a_peer_that_closes_in_the_middle_of_a_drain_ends_the_reader(bench: Bench) -> None:
    bench.watch("j/a")
    bench.fill()
    await wait_all_tasks_blocked()
    bench.peer.close()
    await wait_all_tasks_blocked()
    assert bench.reader.ended == "broken"
    assert not bench.reader._draining


async def test_a_queue_that_fails_while_it_drains_ends_its_reader_only(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> Iterator[bytes]:
        yield b"x" * 1_000_000
        raise ValueError("oops")

    bench.reader.post(failing())
    assert bench.reader._draining
    while not bench.reader.ended:
        await trio.lowlevel.wait_readable(bench.peer)
        bench.peer.recv(65536)
        await wait_all_tasks_blocked()
    assert (bench.reader.ended, bench.reader.ends) == ("broken", 1)
    assert "oops" in caplog.text


@pytest.mark.parametrize("corked", [False, True])
async def test_what_fails_as_it_is_posted_ends_its_reader_and_not_who_posts_it(
    bench: Bench, corked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """That is a publisher who is answered, the wheel, or the hub that has the log begin anew."""

    def failing() -> Iterator[bytes]:
        yield b"x"
        raise ValueError("oops")

    bench.reader.corked = corked
    bench.reader.post(failing())
    bench.reader.finish("closed")
    assert (bench.reader.ended, bench.reader.ends) == ("broken", 1)
    assert "oops" in caplog.text


async def test_of_many_with_much_to_send_one_goes_on_each_time(nursery: trio.Nursery, short_turns: None) -> None:
    """What is queued is made as it is sent: of many who get a large snapshot each would take its turn in every pass."""
    made: list[int] = []
    benches = [Bench(nursery) for _ in range(20)]

    def pieces(number: int) -> Iterator[bytes]:
        for _ in range(10):
            made.append(number)
            yield b"x"

    for number, bench in enumerate(benches):
        bench.reader.post(pieces(number))
    assert all(bench.reader._draining for bench in benches)
    most, before = 0, len(made)
    while any(bench.reader._draining for bench in benches):
        for bench in benches:
            with suppress(BlockingIOError):
                bench.peer.recv(65536)
        await trio.lowlevel.checkpoint()
        most, before = max(most, len(made) - before), len(made)
    assert len(made) == 20 * 10
    assert most <= 2, "one, and perhaps another as the order of tasks in a pass is random"
    for bench in benches:
        bench.close()


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is over after a piece."""
    monkeypatch.setattr(reader_module, "TURN_S", -1.0)
