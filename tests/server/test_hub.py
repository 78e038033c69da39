"""The hub from the inside: what the flusher does, when, and what it costs in encodings."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints, wait_all_tasks_blocked

from protocol.update import Update
from protocol.watch import ANY, EVERYTHING, job_channel, user_channel
from server import beat as beat_module
from server import hub as hub_module
from server.channel import Want
from tests.server.hub_bench import Bench, CountingForm, Recorder
from tests.support import PATIENCE_S, until


@pytest.fixture
def bench(nursery: trio.Nursery) -> Bench:
    return Bench(nursery)


async def test_registering_and_delivering_never_wait(bench: Bench) -> None:
    with assert_no_checkpoints():
        reader = bench.reader("j/a", "u/u")
        bench.next()
        bench.hub.attach(reader, ["*"], Want(ANY, bench.form))
        bench.hub.detach(reader, ["*", "unknown"])
        bench.hub.log_lost()
        bench.hub.leave(reader)
    assert not bench.hub.channels
    assert not bench.hub.readers
    with assert_checkpoints():
        await wait_all_tasks_blocked()


async def test_leaving_leaves_nothing(bench: Bench) -> None:
    one, two = bench.reader("j/a", "j/b"), bench.reader("j/b")
    assert (one.multi, two.multi) == (True, False)
    bench.hub.detach(one, ["j/b"])
    assert not one.multi
    assert set(bench.hub.channels) == {"j/a", "j/b"}
    bench.hub.leave(one)
    assert set(bench.hub.channels) == {"j/b"}
    bench.next("b")
    bench.hub.leave(two)  # with something pending
    assert not bench.hub.channels
    await wait_all_tasks_blocked()
    assert two.sent == []
    assert bench.hub.given() == bench.history.last


async def test_an_update_is_offered_on_its_four_channels(bench: Bench) -> None:
    names = [EVERYTHING, user_channel("u"), job_channel("a"), job_channel("a", "u")]
    readers = [bench.reader(name) for name in names]
    others = [bench.reader(name) for name in (user_channel("v"), job_channel("b"), job_channel("a", "v"))]
    bench.next("a", "u")
    await wait_all_tasks_blocked()
    assert [reader.sent for reader in readers] == [[b"e:1 "]] * 4
    assert [reader.sent for reader in others] == [[]] * 3


async def test_a_flush_encodes_once_per_form_and_sends_once_per_reader(bench: Bench) -> None:
    other = CountingForm()
    readers = [bench.reader("j/a", form=form) for form in (bench.form, other) * 50]
    for _ in range(3):
        bench.next()
    await wait_all_tasks_blocked()
    assert bench.form.encoded == other.encoded == [[1, 2, 3]]
    assert all(reader.sent == [b"e:1 e:2 e:3 "] for reader in readers)
    assert all(reader.offset == 3 for reader in readers)
    bench.next()
    await wait_all_tasks_blocked()
    assert bench.form.encoded == [[1, 2, 3], [4]]
    assert all(len(reader.sent) == 2 for reader in readers)


async def test_several_channels_are_merged_in_log_order_without_doubles(bench: Bench) -> None:
    readers = [bench.reader("j/a", "u/u", "*") for _ in range(3)]
    apart = bench.reader("j/a", "j/b")
    bench.next("a")
    bench.next("b", "v")
    bench.next("c", "u")
    bench.next("a")
    await wait_all_tasks_blocked()
    assert all(reader.sent == [b"e:1 e:2 e:3 e:4 "] for reader in readers)
    assert apart.sent == [b"e:1 e:2 e:4 "]
    assert sorted(bench.form.encoded) == [[1, 2, 3, 4], [1, 2, 4]]  # shared by those who watch the same
    assert (readers[0].offset, apart.offset) == (4, 4)


async def test_who_is_not_direct_takes_the_batch(bench: Bench) -> None:
    one, two = bench.reader("j/a"), bench.reader("j/a", "j/b")
    one.direct = two.direct = False
    bench.next()
    bench.next()
    await wait_all_tasks_blocked()
    assert one.taken == two.taken == [[1, 2]]
    assert bench.form.encoded == []


@pytest.mark.parametrize("names", [["j/a"], ["j/a", "j/b"]])
async def test_an_end_goes_the_slow_way_to_those_who_count(bench: Bench, names: list[str]) -> None:
    counting, plain = bench.reader(*names), bench.reader(*names)
    counting.open_jobs = {"a"}
    bench.next()
    await wait_all_tasks_blocked()
    bench.next(ended=True)
    await wait_all_tasks_blocked()
    assert (counting.sent, counting.taken) == ([b"e:1 "], [[2]])
    assert plain.sent == [b"e:1 ", b"e:2 "]


@pytest.mark.parametrize("names", [["j/a"], ["j/a", "j/b"]])
async def test_nobody_is_given_what_it_was_given_before(bench: Bench, names: list[str]) -> None:
    """A reader that came, or caught up, while updates were pending."""
    early = bench.reader(*names)
    bench.next()
    bench.next()
    late, half = bench.reader(*names), bench.reader(*names)
    half.offset -= 1
    await wait_all_tasks_blocked()
    assert early.sent == [b"e:1 e:2 "]
    assert (late.sent, late.taken) == ([], [])
    # It gets the whole batch, and drops itself what it has.
    assert (half.sent, half.taken) == ([], [[1, 2]])


async def test_a_full_socket_stalls_its_reader_alone(bench: Bench) -> None:
    full, half, fine = bench.reader("j/a"), bench.reader("j/a", "j/b"), bench.reader("j/a")
    full.room, half.room = 0, 2
    bench.next()
    await wait_all_tasks_blocked()
    assert full.rest == [(b"e:1 ", 0)]
    assert half.rest == [(b"e:1 ", 2)]
    assert fine.sent == [b"e:1 "]
    bench.next()
    await wait_all_tasks_blocked()
    assert full.taken == half.taken == [[2]]
    assert fine.sent == [b"e:1 ", b"e:2 "]


@pytest.mark.parametrize("failure", [ConnectionResetError(), BrokenPipeError(), RuntimeError("a bug")])
@pytest.mark.parametrize("direct", [True, False])
async def test_whatever_goes_wrong_with_one_reader_ends_that_one(
    bench: Bench, failure: Exception, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for names in (["j/a"], ["j/a", "j/b"]):
        bad, good = bench.reader(*names), bench.reader(*names)
        bad.failure, bad.direct = failure, direct
        bench.next()
        await wait_all_tasks_blocked()
        assert bad.ended
        assert len(good.sent) == 1
        with caplog.at_level(logging.ERROR):
            caplog.clear()
            bench.hub.log_lost()
        assert (bad.resets, good.resets) == (1, 1)
        assert ("delivery_failed" in caplog.text) == isinstance(failure, RuntimeError)
        bench.hub.leave(bad)
        bench.hub.leave(good)


async def test_not_even_an_end_that_goes_wrong_reaches_the_others(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = bench.reader("j/a"), bench.reader("j/a")
    bad.failure = ConnectionResetError()

    def fail() -> None:
        raise RuntimeError("another bug")

    monkeypatch.setattr(bad, "broken", fail)
    bench.next()
    await wait_all_tasks_blocked()
    assert good.sent == [b"e:1 "]
    assert "another bug" in caplog.text


async def test_what_is_to_be_done_soon_may_fail_for_one_reader_only(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = bench.reader("j/a"), bench.reader("j/a")

    def fail() -> None:
        raise RuntimeError("a bug")

    with caplog.at_level(logging.ERROR):
        bench.hub.soon(bad, fail)
        bench.hub.soon(good, partial(good.sent.append, b"soon "))
        await wait_all_tasks_blocked()
    assert bad.ended
    assert "delivery_failed" in caplog.text
    bench.next()
    await wait_all_tasks_blocked()
    assert good.sent == [b"soon ", b"e:1 "]


async def test_others_run_between_many_things_to_be_done_soon(bench: Bench, impatient: None) -> None:
    reader = bench.reader("j/a")
    called: list[int] = []
    for number in range(50):
        bench.hub.soon(reader, partial(called.append, number))
    turns = 0
    while len(called) < 50:
        before = len(called)
        await trio.lowlevel.checkpoint()
        assert len(called) <= before + 2, "one, and perhaps another as the order of tasks in a pass is random"
        turns += 1
    assert turns >= 25
    assert called == list(range(50))


async def test_what_is_to_be_done_soon_is_done_though_the_beat_ends_in_the_middle_of_it(
    bench: Bench, beat: pytest.MonkeyPatch, impatient: None
) -> None:
    beat.setattr(beat_module, "BEAT_S", 0.5)
    beat.setattr(hub_module, "GRACE_S", 0.0)
    a, b = bench.reader("j/a"), bench.reader("j/b")
    called: list[bool] = []

    def last_longer() -> None:
        called.append(b.sent == [])
        time.sleep(0.6)  # in whose turn the beat ends

    bench.next("a")
    while not a.sent:
        await trio.lowlevel.checkpoint()
    bench.next("a")
    bench.next("b")
    await wait_all_tasks_blocked()
    for callback in (last_longer, partial(called.append, True), partial(called.append, True)):
        bench.hub.soon(a, callback)
    await until(lambda: b.sent)
    assert called == [True, True, True]


async def test_the_flusher_yields_within_a_channel(bench: Bench, impatient: None) -> None:
    """Others run while a large channel is served, and may come and go meanwhile."""
    readers = [bench.reader("j/a") for _ in range(50)]
    shared = [bench.reader("j/a", "j/b") for _ in range(50)]
    turns = 0
    bench.next()
    while not shared[-1].sent:
        await trio.lowlevel.checkpoint()
        turns += 1
        if turns == 5:
            bench.hub.leave(readers[10])
            late = bench.reader("j/a")
            bench.next()
            assert bench.hub.given() == 0  # nobody's cursor may pass what is under way
    assert turns >= 50
    await wait_all_tasks_blocked()
    assert all(reader.sent == [b"e:1 ", b"e:2 "] for reader in readers if reader is not readers[10])
    assert all(reader.sent == [b"e:1 ", b"e:2 "] for reader in shared)
    assert late.sent == [b"e:2 "]
    assert bench.hub.given() == 2


async def test_who_leaves_during_a_flush_is_sent_no_more(bench: Bench, impatient: None) -> None:
    """Neither of the channel that is being served, nor of those that are encoded already."""
    readers = [[bench.reader(f"j/{job}") for _ in range(10)] for job in ("a", "b")]
    for job in ("a", "b"):
        bench.next(job)
    while not readers[0][2].sent:
        await trio.lowlevel.checkpoint()
    assert bench.form.encoded == [[1], [2]]
    gone = [readers[0][7], readers[1][0], readers[1][7]]
    gone[1].direct = False
    for reader in gone:
        bench.hub.leave(reader)
    await wait_all_tasks_blocked()
    for offset, channel in enumerate(readers, 1):
        assert all(reader.sent == [b"e:%d " % offset] for reader in channel if reader not in gone)
    assert [reader.sent + reader.taken for reader in gone] == [[], [], []]


async def test_readers_that_leave_as_they_are_served_cost_those_behind_them_nothing(
    bench: Bench, impatient: None
) -> None:
    """As polls that wait do: a look through all the rest for each of ten thousand would take seconds."""
    looks = 0

    class Leaving(Recorder):
        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            return id(self)

        def take(self, batch: Sequence[Update]) -> None:
            super().take(batch)
            bench.hub.leave(self)

    readers = [Leaving(bench.form, direct=False) for _ in range(200)]
    for reader in readers:
        bench.hub.attach(reader, ["j/a"], Want(ANY, bench.form))  # type: ignore[arg-type]
    looks = 0
    bench.next()
    await wait_all_tasks_blocked()
    assert all(reader.taken == [[1]] for reader in readers)
    assert not bench.hub.readers
    assert looks <= 10 * len(readers)


async def test_a_form_that_fails_ends_its_readers_alone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(CountingForm):
        def updates(self, updates: Sequence[Update], epoch: str) -> bytes:
            raise RuntimeError("a bug")

    failing = Failing()
    good, bad, worse = bench.reader("j/a"), bench.reader("j/a", form=failing), bench.reader("j/a", form=failing)
    first, other = bench.reader("j/b", form=failing), bench.reader("j/b")
    bench.next("a")
    bench.next("b")
    with caplog.at_level(logging.ERROR):
        await wait_all_tasks_blocked()
    assert (good.sent, other.sent) == ([b"e:1 "], [b"e:2 "])
    for reader in (bad, worse, first):
        assert (reader.ended, reader.sent) == (True, [])
    assert caplog.text.count("delivery_failed") == 3


async def test_what_arrives_during_a_flush_goes_together_in_the_next(bench: Bench, impatient: None) -> None:
    readers = [bench.reader("j/a") for _ in range(10)]
    bench.next()
    while not readers[0].sent:
        await trio.lowlevel.checkpoint()
    bench.next()
    bench.next()
    await wait_all_tasks_blocked()
    assert readers[-1].sent == [b"e:1 ", b"e:2 e:3 "]


async def test_what_can_be_read_before_a_flush_goes_along(bench: Bench, nursery: trio.Nursery) -> None:
    """Whoever comes first in a pass of the loop, the flusher or who reads."""
    reader = bench.reader("j/a")
    unread = 0

    async def read() -> None:
        nonlocal unread
        assert bench.hub.urgent()
        unread = 0
        bench.next()
        bench.hub.soon(reader, partial(reader.sent.append, b"soon "))

    bench.hub._wanted = lambda: unread > 0
    for first in range(1, 41, 2):
        bench.next()
        unread = 1
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert reader.sent == [b"soon ", b"e:%d e:%d " % (first, first + 1)]
        reader.sent.clear()


async def test_who_reads_has_a_turn_in_each_pause_of_a_flush(
    bench: Bench, nursery: trio.Nursery, impatient: None
) -> None:
    """Whoever comes first in a pass of the loop."""
    readers = [bench.reader("j/a") for _ in range(3 * hub_module.LOOK_EVERY)]
    unread = sent = 0
    served: list[int] = []

    async def read() -> None:
        nonlocal unread
        unread = 0
        served.append(sum(len(reader.sent) for reader in readers) - sent)

    def send(data: bytes, /) -> int:
        nonlocal unread
        unread = 1
        nursery.start_soon(read)
        readers[0].sent.append(data)
        return len(data)

    readers[0].sock_send = send  # type: ignore[method-assign]
    bench.hub._wanted = lambda: unread > 0
    for _ in range(20):
        bench.next()
        await wait_all_tasks_blocked()
        sent = sum(len(reader.sent) for reader in readers)
    assert served == [hub_module.LOOK_EVERY] * 20


@pytest.fixture
def beat(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The flusher counts as busy, and the next beat is an hour away."""
    monkeypatch.setattr(beat_module, "BUSY", -1.0)
    monkeypatch.setattr(beat_module, "BEAT_S", 3600.0)
    monkeypatch.setattr(hub_module, "GRACE_S", 3600.0)
    return monkeypatch


async def test_flushes_to_several_channels_are_put_off_to_the_beat(bench: Bench, beat: pytest.MonkeyPatch) -> None:
    a, b = bench.reader("j/a"), bench.reader("j/b")
    called: list[int] = []
    for job in ("a", "a"):
        bench.next(job)
        await wait_all_tasks_blocked()
    assert a.sent == [b"e:1 ", b"e:2 "]  # one channel is not
    for job in ("a", "b", "b"):
        bench.next(job)
    await wait_all_tasks_blocked()
    bench.next("a")
    bench.hub.soon(a, partial(called.append, 1))  # nor is this
    await wait_all_tasks_blocked()
    assert (len(a.sent), b.sent, called) == (2, [], [1])
    assert bench.hub.given() == 2  # nobody's cursor passes what waits
    late = bench.reader("j/b")
    bench.hub.log_lost()
    await wait_all_tasks_blocked()
    assert (len(a.sent), b.sent, late.sent) == (2, [], [])
    assert (a.resets, b.resets, late.resets) == (1, 1, 1)


async def test_what_comes_after_the_beat_ends_the_wait_and_goes_along(bench: Bench, beat: pytest.MonkeyPatch) -> None:
    beat.setattr(beat_module, "BEAT_S", 0.02)
    a, b = bench.reader("j/a"), bench.reader("j/b")
    bench.next("a")
    while not a.sent:
        await trio.lowlevel.checkpoint()
    with trio.fail_after(60):
        while not b.sent:
            bench.next("a")
            bench.next("b")
            await wait_all_tasks_blocked()
    last = bench.history.last
    assert (len(a.sent), len(b.sent)) == (2, 1)
    assert a.sent[-1].endswith(b"e:%d " % (last - 1))
    assert b.sent[-1].endswith(b"e:%d " % last)


async def test_the_clock_ends_the_wait_if_nothing_comes(bench: Bench, beat: pytest.MonkeyPatch) -> None:
    beat.setattr(beat_module, "BEAT_S", 0.02)
    beat.setattr(hub_module, "GRACE_S", 0.0)
    a, b = bench.reader("j/a"), bench.reader("j/b")
    bench.next("a")
    while not a.sent:
        await trio.lowlevel.checkpoint()
    bench.next("a")
    bench.next("b")
    await until(lambda: b.sent)
    assert (a.sent, b.sent) == ([b"e:1 ", b"e:2 "], [b"e:3 "])


async def test_a_flush_of_large_updates_is_cut(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "JOIN_BYTES", 100)
    one, two = bench.reader("j/a"), bench.reader("j/a", "j/b")
    for size in (60, 30, 60, 500, 10):
        bench.next(body=b"x" * size)
    await wait_all_tasks_blocked()
    assert one.sent == two.sent == [b"e:1 e:2 ", b"e:3 ", b"e:4 ", b"e:5 "]


async def test_kept_encodings_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "SHARED_BYTES", 10)
    readers = [bench.reader("j/a", "j/b") for _ in range(2)]
    apart = [bench.reader("j/a", f"j/{number}") for number in range(10)]
    bench.next("a")
    for number in range(10):
        bench.next(str(number))
    await wait_all_tasks_blocked()
    assert all(reader.sent == [b"e:1 "] for reader in readers)
    assert [reader.sent for reader in apart] == [[b"e:1 e:%d " % (number + 2)] for number in range(10)]


async def test_the_cursor_of_the_quiet_moves_only_with_what_was_given(bench: Bench) -> None:
    hub = bench.hub
    assert hub.given() == 0
    bench.next("nobody")
    assert hub.given() == 1
    reader = bench.reader("j/a")
    bench.next("a")
    bench.next("nobody")
    assert hub.given() == 1
    await wait_all_tasks_blocked()
    assert hub.given() == 3
    assert reader.sent == [b"e:2 "]
    bench.next("nobody")
    assert hub.given() == 4


async def test_publishers_wait_while_too_much_is_pending(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "PENDING_BYTES", 1000)
    bench = Bench(None)
    reader = bench.reader("j/a")
    bench.next(body=b"x" * 1000)
    with assert_no_checkpoints():
        await bench.hub.wait_room()
    passed: list[int] = []

    async def publisher(number: int) -> None:
        await bench.hub.wait_room()
        passed.append(number)

    for number in (1, 2):
        # More comes while one waits already: by a lease, or in the group of another publisher.
        bench.next(body=b"x")
        nursery.start_soon(publisher, number)
        await wait_all_tasks_blocked()
    bench.next(body=b"x")
    assert passed == []
    nursery.start_soon(bench.hub.run)
    await wait_all_tasks_blocked()
    assert sorted(passed) == [1, 2]
    assert reader.offset == 4
    with assert_no_checkpoints():
        await bench.hub.wait_room()


async def test_nobody_waits_for_room_in_a_log_that_was_lost(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "PENDING_BYTES", 1000)
    bench = Bench(None)
    bench.reader("j/a")
    bench.next(body=b"x" * 2000)
    nursery.start_soon(bench.hub.wait_room)
    await wait_all_tasks_blocked()
    bench.hub.log_lost()
    with trio.fail_after(PATIENCE_S):
        while nursery.child_tasks:
            await trio.lowlevel.checkpoint()


async def test_a_log_lost_in_the_middle_of_a_flush_voids_the_rest_of_it(bench: Bench, impatient: None) -> None:
    first = [bench.reader("j/a") for _ in range(5)]
    second = [bench.reader("j/b") for _ in range(5)]
    both = [bench.reader("j/a", "j/b") for _ in range(5)]
    for _ in range(10):
        bench.next("a")
        bench.next("b")
    while not first[1].sent:
        await trio.lowlevel.checkpoint()
    everyone = [*first, *second, *both]
    sent = [len(reader.sent) for reader in everyone]
    assert 0 < sum(sent) < 5
    bench.history.restart("f")
    for reader in everyone:
        reader.offset = 0
    bench.hub.log_lost()
    assert bench.hub.given() == 0
    await wait_all_tasks_blocked()
    assert all(reader.resets == 1 for reader in everyone)
    assert [len(reader.sent) for reader in everyone] == sent
    # The cursor follows the new log, not the offsets of the old one.
    assert bench.hub.given() == 0
    bench.next("a")
    assert bench.hub.given() == 0
    await wait_all_tasks_blocked()
    assert bench.hub.given() == 1
    assert all(reader.sent[-1] == b"f:1 " for reader in [*first, *both])
