"""One node as a model: the measured costs of its parts, put together again as the flusher puts them together.

It knows what things cost and who waits for whom. It knows nothing of other processes, of the kernel's scheduling or of
a publisher that comes late: what it says of latency is the least that there can be. `perf/simulate.py` shows it.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

from server.beat import Beat
from server.hub import GRACE_S

BIN_US: Final = 50.0


@dataclass(frozen=True)
class Costs:
    """Of one core of the machine in perf/results/, in microseconds unless the name says otherwise."""

    send: float = 3.54  # one update to one reader; nearly all of it is the kernel's
    send_cold: float = 8.0  # the same after a pause: the caches are cold, and the reader has to be woken
    cold_after: float = 20_000.0
    joined_update: float = 0.0224  # every further update in the same send
    joined_byte: float = 0.000032  # and every byte of it
    flush: float = 118.0  # begun, with the passes through the loop; its first sends wake readers
    channel: float = 18.4  # a channel that has something, in each flush
    publish: float = 115.0  # by an HTTP request of its own, while there is other work; 142 if each wakes the node up
    publish_further: float = 7.9  # every further update in the same request: 9.0 each, in batches of a hundred
    turn: float = 1_000.0  # the flusher lets others run after this long
    turn_over: float = 20.0  # what that costs
    redis_publish: float = 25.0  # of the node that publishes, in batches
    redis_receive: float = 10.0  # of each node that follows the job's owner
    redis_itself: float = 24.0  # of Redis
    connect: float = 141.0  # handshake, token, subscription, snapshot, end; WebSocket
    pong: float = 28.6  # a ping is answered: at most what an update over WebSocket takes
    connection_bytes: float = 1_893.0  # resident, idle and subscribed
    kernel_bytes: float = 3_800.0  # its socket

    @property
    def lone(self) -> float:
        """An update beside its deliveries, if it is the only one on its channel; five in a flush, as was measured."""
        return self.channel + self.flush / 5

    def delivery(self, updates: int, size: int, cold: bool = False) -> float:
        """One `send` of so many updates of `size` bytes to one reader."""
        further = updates - 1
        return (self.send_cold if cold else self.send) + further * (self.joined_update + size * self.joined_byte)


MEASURED: Final = Costs()


@dataclass(frozen=True)
class Load:
    """What a node has to do: `rate` updates/s, `batch` in a request, by turns to `channels` of `readers` each."""

    rate: float
    readers: int
    channels: int = 1
    batch: int = 1
    size: int = 297


@dataclass(frozen=True)
class Outcome:
    """What the node makes of it. Latencies in milliseconds; `core` is the share of one that it uses."""

    core: float
    p50: float
    p99: float
    updates_per_send: float
    deliveries_per_s: float


def simulate(load: Load, costs: Costs = MEASURED, seconds: float = 5.0) -> Outcome:
    """Runs one node for so long: requests come on a schedule, the flusher sends what has gathered."""
    every = 1e6 * load.batch / load.rate
    requests = deque(number * every for number in range(max(1, int(seconds * 1e6 / every))))
    one = costs.publish + costs.publish_further * (load.batch - 1)
    pending: dict[int, list[float]] = {}
    delays: Counter[int] = Counter()
    now = busy = 0.0
    sends = deliveries = 0
    turn = 0
    beat = Beat()

    def take_in() -> None:
        """All requests that have come: their updates wait for the next flush, their work delays this one."""
        nonlocal now, busy, turn
        while requests and requests[0] <= now:
            came = requests.popleft()
            now += one
            busy += one
            for _ in range(load.batch):
                pending.setdefault(turn % load.channels, []).append(came)
                turn += 1

    def gather(left: float) -> None:
        """The flush is put off for so long: what comes then ends that, or a little later the clock."""
        nonlocal now
        before = sum(map(len, pending.values()))
        due = now + left
        while now < due:
            now = min(requests[0], due + GRACE_S * 1e6) if requests else due + GRACE_S * 1e6
            take_in()
        beat.put_off(before, sum(map(len, pending.values())))

    while requests or pending:
        cold = False
        if not pending:
            cold = requests[0] - now > costs.cold_after
            now = max(now, requests[0])
            take_in()
        if len(pending) > 1 and (left_s := beat.left(now / 1e6)):
            gather(left_s * 1e6)
        batch, pending = pending, {}
        began = now
        now += costs.flush
        busy += costs.flush
        since = now
        for stamps in batch.values():
            each = costs.delivery(len(stamps), load.size, cold)
            now += costs.channel
            busy += costs.channel
            left = load.readers
            while left:
                some = min(left, max(1, int((costs.turn - (now - since)) / each)))
                middle = now + some * each / 2
                for stamp in stamps:
                    delays[int((middle - stamp) / BIN_US)] += some
                now += some * each
                busy += some * each
                left -= some
                sends += some
                deliveries += some * len(stamps)
                if now - since >= costs.turn - each:
                    now += costs.turn_over
                    busy += costs.turn_over
                    take_in()
                    since = now
        beat.flushed(began / 1e6, now / 1e6)
    return Outcome(
        busy / now, _quantile(delays, 0.5), _quantile(delays, 0.99), deliveries / sends, deliveries / (now / 1e6)
    )


def _quantile(delays: Counter[int], share: float) -> float:
    """Milliseconds."""
    left = share * delays.total()
    for number in sorted(delays):
        left -= delays[number]
        if left <= 0:
            return (number + 0.5) * BIN_US / 1000
    return 0.0


@dataclass(frozen=True)
class Point:
    """Something that was measured, to be found again by the model."""

    name: str
    load: Load
    core: float | None
    p50: float
    p99: float
    updates_per_send: float


# perf/results/2026-11-22-turns.txt, and 2026-11-22-channels.txt for many channels; over WebSocket. Core: the server's
# process, where it was measured.
POINTS: Final = (
    Point("1,000 readers, 10/s", Load(10, 1_000), None, 3.57, 8.36, 1.0),
    Point("1,000 readers, 10,000/s", Load(10_000, 1_000, batch=100), 0.76, 4.6, 16.3, 100.7),
    Point("the same, short messages", Load(10_000, 1_000, batch=100, size=138), 0.71, 4.4, 11.5, 100.0),
    Point("100 channels of 10 readers, 10,000/s", Load(10_000, 10, channels=100, batch=10), 0.76, 2.79, 5.05, 1.0),
    Point("1,000 channels of one reader, 5,000/s", Load(5_000, 1, channels=1_000, batch=5), 0.36, 0.38, 1.15, 1.0),
)
