"""The hub from the inside, with notifications: merged with updates, held back, broadcast, void in a new epoch."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from protocol.notice import notice_entry, users_of
from protocol.update import Update
from protocol.watch import ANY, job_channel
from server import hub as hub_module
from server.channel import Want
from tests.server.hub_bench import Bench, Recorder, update


def notice(offset: int, *users: str) -> Update:
    return notice_entry(offset, 0, "n", tuple(f"user/{user}" for user in users), b'{"n":1}')


class Audience:
    """Who is to have what, by user."""

    def __init__(self) -> None:
        self.of: dict[str, list[Recorder]] = {}
        self.failure: Exception | None = None

    def __call__(self, one: Update) -> list[Recorder]:
        found = dict.fromkeys(reader for user in users_of(one) for reader in self.of.get(user, ()))
        return list(found)


async def test_notifications_are_merged_with_what_channels_give_for_that_flush_alone(nursery: trio.Nursery) -> None:
    bench, audience = Bench(nursery), Audience()
    bench.hub._audience = audience  # type: ignore[assignment]
    told, other, bare = bench.reader(job_channel("a")), bench.reader(job_channel("a")), bench.reader()
    audience.of = {"x": [told, bare], "y": [told]}
    bench.next("a")
    bench.deliver(notice(2, "x", "y"))
    bench.next("a")
    bench.deliver(notice(4, "y"), notice(5, "nobody"))
    assert told.multi is False
    await wait_all_tasks_blocked()
    assert b"".join(told.sent) == b"e:1 e:2 e:3 e:4 "
    assert b"".join(other.sent) == b"e:1 e:3 "
    assert b"".join(bare.sent) == b"e:2 "
    assert (told.offset, bare.offset) == (4, 2)
    assert [reader.multi for reader in (told, other, bare)] == [False] * 3
    assert bench.hub.given() == bench.history.last == 5
    # The next flush is like any other.
    bench.form.encoded.clear()
    bench.next("a")
    await wait_all_tasks_blocked()
    assert bench.form.encoded == [[6]]
    assert told.sent[-1] == other.sent[-1] == b"e:6 "


async def test_readers_that_hold_back_take_notifications_too_and_nobody_gets_one_twice(nursery: trio.Nursery) -> None:
    bench, audience = Bench(nursery), Audience()
    bench.hub._audience = audience  # type: ignore[assignment]
    slow, late = bench.reader(job_channel("a")), bench.reader()
    slow.direct = False
    late.offset = 2  # it came when these were in the log already
    audience.of = {"x": [slow, late]}
    bench.deliver(notice(1, "x"), notice(2, "x"), update(3), notice(4, "x"))
    await wait_all_tasks_blocked()
    assert slow.taken == [[1, 2, 3, 4]]
    assert late.taken == [[1, 2, 4]]  # a reader drops what it has
    assert late.sent == []


async def test_notifications_that_wait_count_as_pending_and_are_void_in_a_new_epoch() -> None:
    bench, audience = Bench(None), Audience()
    bench.hub._audience = audience  # type: ignore[assignment]
    reader = bench.reader()
    audience.of = {"x": [reader]}
    bench.deliver(notice(1, "x"))
    assert bench.hub.pending_bytes == len(b'{"n":1}')
    assert bench.hub.given() == 0
    bench.history.restart("f", 9)
    bench.hub.log_lost()
    assert (bench.hub.pending_bytes, bench.hub.given(), reader.resets) == (0, 9, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.hub.run)
        await wait_all_tasks_blocked()
        assert reader.sent == []
        nursery.cancel_scope.cancel()


async def test_one_broken_reader_of_a_broadcast_harms_no_other_and_a_large_one_lets_others_run(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "YIELD_AFTER_S", 0.0)
    bench, audience = Bench(nursery), Audience()
    bench.hub._audience = audience  # type: ignore[assignment]
    readers = [bench.reader() for _ in range(100)]
    readers[3].failure = ConnectionResetError()
    audience.of = {"x": list(readers)}
    bench.deliver(notice(1, "x"))
    await wait_all_tasks_blocked()
    assert readers[3].ended
    assert all(reader.sent == [b"e:1 "] for reader in readers if reader is not readers[3])
    assert bench.form.encoded == [[1]]


async def test_a_notification_whose_audience_cannot_be_told_is_left_out(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """Another node, which is newer, may have targets of a kind that this one does not know."""
    bench = Bench(nursery)
    reader = bench.reader(job_channel("a"))

    def audience(one: Update) -> list[Recorder]:
        assert users_of(one) != ["x"], "unknown"
        return [reader]

    bench.hub._audience = audience  # type: ignore[assignment]
    bench.deliver(notice(1, "x"), notice(2, "y"))
    bench.next("a")
    await wait_all_tasks_blocked()
    assert reader.sent == [b"e:2 e:3 "]
    assert "unknown" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "always_s", "between"),
    [(False, 3600.0, False), (True, 3600.0, True), (False, -1.0, True)],
    ids=["nobody waits", "a socket has something", "for a long time"],
)
async def test_others_run_in_between_when_somebody_waits(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    impatient: None,
    wanted: bool,
    always_s: float,
    between: bool,
) -> None:
    monkeypatch.setattr(hub_module, "YIELD_ALWAYS_S", always_s)
    bench, passes, seen = Bench(nursery), 0, set()
    bench.hub._wanted = lambda: wanted

    class Noting(Recorder):
        def sock_send(self, data: bytes, /) -> int:
            seen.add(passes)
            return super().sock_send(data)

    readers = [Noting(bench.form) for _ in range(20)]
    for reader in readers:
        bench.hub.attach(reader, ["j/a"], Want(ANY, bench.form))  # type: ignore[arg-type]

    async with trio.open_nursery() as others:

        async def other() -> None:
            nonlocal passes
            while not all(reader.sent for reader in readers):
                passes += 1
                await trio.lowlevel.checkpoint()

        others.start_soon(other)
        bench.next()
    assert (len(seen) > 1) is between
