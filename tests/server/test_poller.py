"""Turns: who waits holds up nobody, and what goes wrong in one stays in it."""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import ClassVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from server import poller as module
from server.poller import Peer, Poller
from tests.support import until

Do = Callable[[bytes], Awaitable[bool]]


class Echo(Peer):
    """Reads, and does what it was given to do with it."""

    made: ClassVar[list[socket.socket]] = []

    def __init__(self, do: Do) -> None:
        self.sock, self.far = socket.socketpair()
        self.made += [self.sock, self.far]
        self.sock.setblocking(False)
        self.far.setblocking(False)
        self.do = do
        self.turns = 0
        self.seen = b""
        self.abandoned = False

    async def turn(self) -> bool:
        self.turns += 1
        try:
            data = self.sock.recv(100)
        except BlockingIOError:
            data = b""
        self.seen += data
        return await self.do(data)

    def abandon(self) -> None:
        self.abandoned = True


async def nothing(data: bytes) -> bool:
    return False


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[socket.socket] = []
    monkeypatch.setattr(Echo, "made", made)
    yield
    for sock in made:
        sock.close()


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    poller = Poller()
    async with trio.open_nursery() as nursery:
        poller.start(nursery)
        yield poller
        nursery.cancel_scope.cancel()
    poller.close()


def added(poller: Poller, do: Do = nothing) -> Echo:
    peer = Echo(do)
    poller.add(peer.sock.fileno(), peer)
    return peer


async def test_turns_come_with_what_is_sent(poller: Poller) -> None:
    peer = added(poller)
    peer.far.send(b"a")
    await until(lambda: peer.seen == b"a")
    turns = peer.turns
    await wait_all_tasks_blocked()
    assert peer.turns == turns, "who has read everything is left alone"
    peer.far.send(b"b")
    await until(lambda: peer.seen == b"ab")


async def test_what_a_turn_adds_has_its_first_turn_unasked(poller: Poller) -> None:
    added_later: list[Echo] = []

    async def add(data: bytes) -> bool:
        added_later.append(added(poller))
        return False

    added(poller, add).far.send(b"a")
    await until(lambda: bool(added_later) and added_later[0].turns == 1)


async def test_who_waits_holds_up_nobody_and_is_not_disturbed(poller: Poller) -> None:
    gate = trio.Event()

    async def wait(data: bytes) -> bool:
        if data:
            await gate.wait()
        return False

    waiting, other = added(poller, wait), added(poller)
    await wait_all_tasks_blocked()
    waiting.far.send(b"a")
    await until(lambda: waiting.seen == b"a")
    turns = waiting.turns
    waiting.far.send(b"b")
    for count in range(1, 20):
        other.far.send(b"x")
        await until(lambda count=count: other.seen == b"x" * count)
    await wait_all_tasks_blocked()
    assert waiting.turns == turns
    assert waiting.sock.fileno() in poller._masked, "it would be reported for ever"
    gate.set()
    await until(lambda: waiting.seen == b"ab")
    assert not poller._masked
    assert not poller._waiting


async def test_many_wait_at_once_and_their_tasks_are_kept_within_bounds(
    poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PARKED", 3)
    gate = trio.Event()

    async def wait(data: bytes) -> bool:
        await gate.wait()
        return False

    peers = [added(poller, wait) for _ in range(10)]
    for peer in peers:
        peer.far.send(b"a")
    await until(lambda: len(poller._waiting) == 10)
    gate.set()
    await until(lambda: not poller._waiting)
    assert len(poller._parked) <= 3
    for peer in peers:
        peer.far.send(b"a")
    await until(lambda: all(peer.seen == b"aa" for peer in peers))


async def test_what_was_reported_once_is_not_asked_for_again_by_the_next_leader(poller: Poller) -> None:
    gate = trio.Event()

    async def wait(data: bytes) -> bool:
        if data:
            await gate.wait()
        return False

    peers = [added(poller, wait) for _ in range(10)]
    await wait_all_tasks_blocked()
    for peer in peers:
        peer.far.send(b"a")
    await until(lambda: len(poller._waiting) == 10)
    await wait_all_tasks_blocked()
    assert not poller._masked, "each was served once, and has nothing more to read"
    gate.set()
    await until(lambda: not poller._waiting)


async def test_a_turn_that_is_wanted_at_once_comes_also_after_waiting(poller: Poller) -> None:
    async def thrice(data: bytes) -> bool:
        if peer.turns < 2:
            await trio.lowlevel.checkpoint()
        return peer.turns < 3

    peer = added(poller, thrice)
    peer.far.send(b"a")
    await until(lambda: peer.turns == 3)
    await wait_all_tasks_blocked()
    assert peer.turns == 3


async def test_one_that_always_wants_more_leaves_time_for_all(poller: Poller) -> None:
    async def greedy(data: bytes) -> bool:
        return True

    peer, other = added(poller, greedy), added(poller)
    peer.far.send(b"a")
    await until(lambda: peer.turns > 100)
    other.far.send(b"a")
    await until(lambda: other.seen == b"a")
    del poller.peers[peer.sock.fileno()]


@pytest.mark.parametrize(
    ("urgent", "always_s", "run"), [(True, 3600.0, True), (False, 0.0, True), (False, 3600.0, False)]
)
async def test_others_run_while_there_are_turns_if_it_is_urgent_or_has_been_long(
    poller: Poller, monkeypatch: pytest.MonkeyPatch, urgent: bool, always_s: float, run: bool
) -> None:
    monkeypatch.setattr(module, "YIELD_AFTER_S", 0.0)
    monkeypatch.setattr(module, "YIELD_ALWAYS_S", always_s)
    poller.urgent = lambda: urgent
    passed = 0
    passed_meanwhile: list[int] = []

    async def two_hundred(data: bytes) -> bool:
        if peer.turns == 1 or peer.turns == 200:
            passed_meanwhile.append(passed)
        return peer.turns < 200

    peer = added(poller, two_hundred)
    peer.far.send(b"a")
    while peer.turns < 200:
        await trio.lowlevel.checkpoint()
        passed += 1
    before, after = passed_meanwhile
    assert after - before > 100 if run else after == before


async def test_who_listens_for_only_some_events_has_turns_for_them_alone_or_when_called(poller: Poller) -> None:
    peer = added(poller)
    await wait_all_tasks_blocked()
    turns, fd = peer.turns, peer.sock.fileno()
    poller.listen_for(fd, 0)
    peer.far.send(b"a")
    await wait_all_tasks_blocked()
    assert peer.turns == turns
    poller.call(fd)
    await until(lambda: peer.turns == turns + 1)
    poller.listen_for(fd, select.EPOLLRDHUP)
    peer.far.send(b"b")
    await wait_all_tasks_blocked()
    assert peer.turns == turns + 1
    peer.far.shutdown(socket.SHUT_WR)
    await until(lambda: peer.turns > turns + 1)
    poller.listen_for(fd, 0)
    await wait_all_tasks_blocked()
    turns = peer.turns
    peer.far.close()  # a hang-up always counts
    await until(lambda: peer.turns > turns)
    del poller.peers[fd]


async def test_a_turn_that_waits_can_be_cancelled_and_another_task_has_its_own_scopes(poller: Poller) -> None:
    outcome: list[str] = []

    async def wait(data: bytes) -> bool:
        if not data:
            return False
        try:
            with trio.move_on_after(0.01) as patience:
                await trio.sleep_forever()
            outcome.append(f"timed out {patience.cancelled_caught}")
            await trio.sleep_forever()
        except trio.Cancelled:
            outcome.append("cancelled")
            raise
        return False

    peer, other = added(poller, wait), added(poller)
    await wait_all_tasks_blocked()
    assert not poller.interrupt(peer)
    peer.far.send(b"a")
    await until(lambda: outcome == ["timed out True"])
    assert poller.interrupt(peer)
    await until(lambda: outcome == ["timed out True", "cancelled"])
    other.far.send(b"a")
    await until(lambda: other.seen == b"a")
    assert not poller._waiting


async def test_a_turn_that_raises_ends_its_peer_only(poller: Poller, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(data: bytes) -> bool:
        if data == b"b":
            await trio.lowlevel.checkpoint()
        if data:
            raise ValueError("oops")
        return False

    peers, other = [added(poller, fail), added(poller, fail)], added(poller)
    for peer, data in zip(peers, (b"a", b"b"), strict=True):
        peer.far.send(data)
    await until(lambda: all(peer.abandoned for peer in peers))
    other.far.send(b"a")
    await until(lambda: other.seen == b"a")
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(failures) == 2


async def test_a_socket_that_nobody_serves_any_more_is_not_asked_about_for_ever(poller: Poller) -> None:
    peer, other = added(poller), added(poller)
    await wait_all_tasks_blocked()
    del poller.peers[peer.sock.fileno()]
    peer.far.send(b"a")
    await wait_all_tasks_blocked()  # it never would be
    other.far.send(b"a")
    await until(lambda: other.seen == b"a")
    assert peer.seen == b""


async def test_closing_abandons_everybody() -> None:
    poller = Poller()
    async with trio.open_nursery() as nursery:
        poller.start(nursery)
        peers = [added(poller) for _ in range(3)]
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    poller.close()
    assert all(peer.abandoned for peer in peers)
    assert not poller.peers


async def test_who_wants_more_and_has_more_to_read_has_no_more_turns_than_others(poller: Poller) -> None:
    async def read_slowly(data: bytes) -> bool:
        return True

    peers = [added(poller, read_slowly) for _ in range(2)]
    greedy, other = peers
    greedy.far.send(b"a" * 100_000)
    await until(lambda: len(greedy.seen) > 50_000)
    for peer in peers:
        del poller.peers[peer.sock.fileno()]
    assert greedy.turns < 2 * other.turns


async def test_who_is_ended_between_two_turns_of_which_the_first_waited_is_not_held_by_the_poller(
    poller: Poller,
) -> None:
    """Either there is no turn under way, and so nothing to interrupt, or there is one that sees to the end."""
    ended: list[bool] = []

    async def wait(data: bytes) -> bool:
        if data:
            await trio.lowlevel.checkpoint()
        if ended:
            outcome.append("seen")
        return bool(data)

    async def end() -> None:
        while not ended:
            if peer.seen and not in_turn:
                ended.append(poller.interrupt(peer))
            await trio.lowlevel.checkpoint()

    class Watched(Echo):
        async def turn(self) -> bool:
            in_turn.append(True)
            try:
                return await super().turn()
            finally:
                in_turn.clear()

    outcome: list[str] = []
    in_turn: list[bool] = []
    peer = Watched(wait)
    poller.add(peer.sock.fileno(), peer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        peer.far.send(b"a")
    await wait_all_tasks_blocked()
    assert ended == [False] or outcome == ["seen"]


async def test_a_turn_says_so_before_each_wait(poller: Poller) -> None:
    class Corked(Echo):
        waited = 0

        def waits(self) -> None:
            self.waited += 1

    async def wait(data: bytes) -> bool:
        for _ in range(2):
            unbroken.append(poller.unbroken(peer))
            await trio.lowlevel.checkpoint()
        return peer.turns < 3

    unbroken: list[bool] = []
    peer = Corked(wait)
    poller.add(peer.sock.fileno(), peer)
    peer.far.send(b"a")
    await until(lambda: peer.turns == 3)
    await wait_all_tasks_blocked()
    assert peer.waited == 6
    assert unbroken == [True, False] * 3
