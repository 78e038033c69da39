"""What to send, and when: decisions only. No socket, no thread, no clock; the caller holds a lock round each call.

News of a job that waits is merged with later news of it, so there is at most one such item per job however long the
server is away. A job's end is an item of its own, closed to later changes; it contains what was still waiting, so that
it is complete by itself. Items keep their order, because a part can only be created after its parent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from statuswire.items import Answer, Item, Notice, Outcome, Refusal, State
from statuswire.spool import Place

INTERVAL: Final = 0.2  # seconds between two sendings of mere progress; a person sees no more than five steps a second
MAX_BATCH: Final = 200  # the portion in which the server decides
MAX_WAITING: Final = 10_000  # jobs with news; then the oldest news goes
MAX_ENDS: Final = 100_000  # some 500 bytes each; their text is on disk
MAX_HELD: Final = 16 * 1024 * 1024  # bytes of ends that could not be put on disk
MAX_NOTICES: Final = 1_000
BASE_DELAY: Final = 0.25
MAX_DELAY: Final = 30.0
MAX_ASKED_DELAY: Final = 300.0  # of Retry-After

# Refusals of single updates that pass by themselves.
PASSING: Final = frozenset(
    (
        "overloaded",
        "store_unavailable",
        "shutting_down",
        "try_later",
        "internal",
        "rate_limited",
        "too_many_connections",
    )
)
# The server refused what an end says, not that the job ends.
UNFIT: Final = frozenset(("invalid_field", "unknown_field", "invalid_update", "malformed_json", "payload_too_large"))
# After these a job of ours is no longer ours to report on.
OVER: Final = frozenset(("job_ended", "job_not_found", "stale_attempt", "owner_fixed", "parent_fixed"))


class Outbox:
    """Everything on its way.

    The lock round each call is reentrant, because a signal handler may have something to say while its own thread is in
    here. So counters are read and written without a call in between, which is where Python runs handlers.

    Args:
        random: a number from 0 to 1.
        interval: seconds between two sendings of mere progress.

    Attributes:
        dropped: how much was given up for want of room.
        missed: how often there was no answer.
    """

    def __init__(self, random: Callable[[], float], interval: float = INTERVAL) -> None:
        self.states: dict[tuple[str, int | None], State] = {}
        self.notices: deque[Notice] = deque()
        self.dropped = 0
        self.missed = 0
        self._random = random
        self._interval = interval
        self._queue: dict[int, Item] = {}
        self._open: dict[tuple[str, int | None], Item] = {}
        self._flying: list[Item] = []
        self._renewing: dict[State, None] = {}
        self._ends = 0
        self._held = 0
        self._ticket = 0
        self._seq = 0
        self._urgent = False
        self._failures = 0
        self._retry_at = 0.0
        self._asked_until = 0.0
        self._sent_at = -1e9
        self._limit = MAX_BATCH

    # What the worker says

    def state(self, job_id: str, attempt: int | None, now: float) -> State:
        """The state of a job that a handle is open for, or one for a single update."""
        return self.states.get((job_id, attempt)) or State(job_id, attempt, {}, now, False)

    def holds(self, job_id: str, attempt: int | None) -> bool:
        """Whether a handle is open for it."""
        return (job_id, attempt) in self.states

    def hold(self, job_id: str, attempt: int | None, identity: dict[str, Any], now: float) -> State:
        """The state for a handle; ``release`` it."""
        state = self.states.get((job_id, attempt))
        if state is None:
            state = self.states[job_id, attempt] = State(job_id, attempt, identity, now, True)
        state.holders += 1
        return state

    def release(self, state: State) -> None:
        """A handle is done with."""
        state.holders -= 1
        if state.holders <= 0:
            self.states.pop(state.key, None)
            self._renewing.pop(state, None)

    def renew(self, state: State, ttl: float) -> None:
        """Keep the lease of a job from now on."""
        state.ttl, state.renew_s = ttl, ttl / 3
        self._renewing[state] = None

    def put(self, state: State, fields: dict[str, Any], *, urgent: bool = False) -> bool:
        """Take in news of a job; whether the sender has to be woken for it."""
        item = self._open.get(state.key)
        if item is not None:
            item.fields.update(fields)
            if urgent and not self._urgent:
                self._urgent = True
                return True
            return False
        if len(self._open) >= MAX_WAITING:
            oldest = next(iter(self._open))
            self._queue.pop(self._open.pop(oldest).ticket, None)
            self.dropped += 1
        item = Item(self._next_ticket(), state, fields)
        self._queue[item.ticket] = self._open[state.key] = item
        self._urgent = self._urgent or urgent
        return True

    def final_fields(self, state: State, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What a job's end has to say to be complete by itself: with all that was not answered yet."""
        merged: dict[str, Any] = {} if state.accepted else dict(state.identity)
        for item in self._flying:
            if item.state.key == state.key and not item.is_end:
                merged.update(item.fields)
        waiting = self._open.get(state.key)
        if waiting is not None:
            merged.update(waiting.fields)
        merged.update(fields)
        return merged

    def put_end(self, state: State, event_id: str, at_us: int, body: bytes | None, place: Place | None) -> Item | None:
        """Take in the end of a job, which replaces the news of it that waits; None if there are too many."""
        size = 0 if body is None else len(body)
        if self._ends >= MAX_ENDS or self._held + size > MAX_HELD:
            self.dropped += 1
            return None
        waiting = self._open.pop(state.key, None)
        if waiting is not None:
            self._queue.pop(waiting.ticket, None)
        state.ended = True
        item = Item(self._next_ticket(), state, {})
        item.event_id, item.at_us, item.body, item.place = event_id, at_us, body, place
        self._queue[item.ticket] = item
        self._ends += 1
        self._held += size
        self._urgent = True
        return item

    def put_notice(self, key: str, body: bytes) -> bool:
        """Take in a notification; whether there was room."""
        if len(self.notices) >= MAX_NOTICES:
            self.dropped += 1
            return False
        self.notices.append(Notice(self._next_ticket(), key, body))
        self._urgent = True
        return True

    def next_seq(self, now_us: int) -> int:
        """A number above all before, and comparable between processes whose clocks agree."""
        seq = self._seq + 1
        if seq < now_us:
            seq = now_us
        self._seq = seq
        return seq

    # What the sender asks

    @property
    def ticket(self) -> int:
        """What was taken in last."""
        return self._ticket

    @property
    def ends(self) -> int:
        """Ends that are not settled."""
        return self._ends

    def is_settled(self, ticket: int) -> bool:
        """Whether everything up to this was answered or given up."""
        return (
            not any(item.ticket <= ticket for item in self._flying)
            and min(self._queue, default=ticket + 1) > ticket
            and (not self.notices or self.notices[0].ticket > ticket)
        )

    def due(self) -> float | None:
        """When there is something to do, monotonic seconds; None for not before something new comes."""
        times = [
            state.heard + state.renew_s for state in self._renewing if state.renew_s and state.key not in self._open
        ]
        if self._queue or self.notices:
            times.append(-1e9 if self._urgent else self._sent_at + self._interval)
        return max(min(times), self._retry_at) if times else None

    def hurry(self) -> None:
        """Try what there is without waiting for a better moment, unless the server itself asked for that."""
        self._retry_at = self._asked_until
        self._urgent = True

    def take(self, now: float, now_us: int) -> list[Item]:
        """What is to be sent now, in order; ``done``, ``failed`` or ``too_much`` must follow."""
        for state in self._renewing:
            if state.renew_s and state.key not in self._open and state.heard + state.renew_s <= now:
                self.put(state, {"ttl": state.ttl})
        due = self.due()
        if due is None or due > now:
            return []
        self._urgent = False
        self._sent_at = now
        tickets = [ticket for _, ticket in zip(range(self._limit), self._queue, strict=False)]
        for ticket in tickets:
            item = self._queue.pop(ticket)
            if self._open.get(item.state.key) is item:
                del self._open[item.state.key]
            if not item.is_end and item.state.ordered:
                item.seq = self.next_seq(now_us)
            item.tries += 1
            item.attempt = item.state.attempt
            self._flying.append(item)
        return list(self._flying)

    def give_back(self, items: Iterable[Item]) -> None:
        """Some of what was taken does not fit into one request."""
        back = set(items)
        for item in back:
            item.tries -= 1
        kept = [item for item in self._flying if item not in back]
        self._requeue([item for item in self._flying if item in back])
        self._flying = kept
        self._urgent = True

    def done(self, answer: Answer, now: float) -> Outcome:
        """The batch was answered."""
        flying, self._flying = self._flying, []
        self._succeeded()
        self._limit = min(MAX_BATCH, self._limit * 2)
        outcome = Outcome([], [], [])
        again: list[Item] = []
        passing = False
        for index, item in enumerate(flying):
            refusal = answer.rejected.get(index)
            if refusal is None:
                item.state.accepted = True
                item.state.heard = now
                self._settle(item, None, outcome)
            elif refusal.code in PASSING:
                again.append(item)
                passing = True
            elif _climbs(item, refusal.code):
                again.append(item)
            elif item.is_end and refusal.code in UNFIT and not item.bared:
                item.bared = True
                again.append(item)
                outcome.unfit.append((item, refusal))
            else:
                self._settle(item, refusal, outcome)
        if answer.duplicates and all(item.tries == 1 for item in flying):
            # Sent for the first time, and known already: somebody else reports one of these jobs, by a clock that is
            # ahead of ours. Then order cannot be told from seq, and news must not vanish for it.
            for item in flying:
                if item.seq:
                    item.state.ordered = False
        for job_id in answer.cancels:
            for state in self._states_of(job_id, flying):
                state.cancel_requested = True
        if again:
            self._requeue(again)
            self._urgent = True
            if passing:
                self._hold_back(now, None)
        return outcome

    def failed(self, now: float, retry_after: float | None) -> None:
        """There was no answer, or one that says to come again."""
        flying, self._flying = self._flying, []
        for item in flying:
            item.unsure = True
        self._requeue(flying)
        self._hold_back(now, retry_after)

    def too_much(self, refusal: Refusal) -> Outcome:
        """The batch as a whole was refused: find out in halves what it was."""
        outcome = Outcome([], [], [])
        flying, self._flying = self._flying, []
        self._succeeded()
        if len(flying) > 1:
            self._limit = max(1, len(flying) // 2)
            self._requeue(flying)
        else:
            for item in flying:
                if item.is_end and not item.bared:
                    item.bared = True
                    outcome.unfit.append((item, refusal))
                    self._requeue([item])
                else:
                    self._settle(item, refusal, outcome)
        self._urgent = True
        return outcome

    def give_up(self, item: Item, refusal: Refusal) -> Outcome:
        """One of what was taken cannot be sent."""
        self._flying.remove(item)
        outcome = Outcome([], [], [])
        self._settle(item, refusal, outcome)
        return outcome

    def next_notice(self, now: float) -> Notice | None:
        """What is to be sent now; ``notice_done`` or ``failed`` must follow."""
        return self.notices[0] if self.notices and now >= self._retry_at else None

    def notice_done(self, notice: Notice) -> None:
        """It was answered, one way or the other."""
        if self.notices and self.notices[0] is notice:
            self.notices.popleft()
        self._succeeded()
        self._urgent = bool(self.notices) or self._urgent

    def for_child(self) -> Outbox:
        """An empty one for a child process, whose parent goes on with all this; handles stay usable in both."""
        outbox = Outbox(self._random, self._interval)
        outbox.states = dict(self.states)
        return outbox

    def _next_ticket(self) -> int:
        self._ticket = ticket = self._ticket + 1
        return ticket

    def _states_of(self, job_id: str, flying: Iterable[Item]) -> Iterable[State]:
        yield from (state for state in self.states.values() if state.job_id == job_id)
        yield from (item.state for item in flying if item.state.job_id == job_id)

    def _settle(self, item: Item, refusal: Refusal | None, outcome: Outcome) -> None:
        item.settled = True
        item.error = refusal
        if item.is_end:
            size = len(item.body) if item.body is not None and item.place is None else 0
            self._ends -= 1
            self._held -= size
        item.body = None
        outcome.done.append(item)
        if refusal is not None:
            outcome.refused.append((item, refusal))
            if refusal.code in OVER:
                item.state.refused = refusal
                self._renewing.pop(item.state, None)

    def _requeue(self, items: list[Item]) -> None:
        """Back to the front. News that was overtaken by newer news takes it in, in its own older place."""
        if not items:
            return
        ended = {item.state.key for item in self._queue.values() if item.is_end} if self._ends else set()
        front: dict[int, Item] = {}
        for item in items:
            front[item.ticket] = item
            key = item.state.key
            if item.is_end:
                ended.add(key)
                continue
            newer = self._open.get(key)
            if newer is not None and key not in ended:
                item.fields = item.fields | newer.fields
                del self._queue[newer.ticket]
                self._open[key] = item
            elif newer is None and key not in ended:
                self._open[key] = item
        self._queue = front | self._queue

    def _succeeded(self) -> None:
        self._failures = 0
        self._retry_at = self._asked_until = 0.0

    def _hold_back(self, now: float, retry_after: float | None) -> None:
        """Full jitter: anything up to a bound that doubles, so that workers do not come back all at once."""
        self.missed += 1
        wait = self._random() * min(MAX_DELAY, BASE_DELAY * 2.0 ** min(self._failures, 16))
        self._failures += 1
        self._asked_until = now + min(retry_after or 0.0, MAX_ASKED_DELAY)
        self._retry_at = self._asked_until + wait
        self._urgent = True


def _climbs(item: Item, code: str) -> bool:
    """Whether an update that came for an attempt that is over is to be sent once more, for the next one.

    A queue gives a job to another worker when it believes the first one dead, and does not always count that. An end
    that was sent without an answer may be what has ended it; and of two workers with one job only the later goes ahead.
    """
    state = item.state
    may = {"job_ended": not (item.unsure and state.ended), "stale_attempt": not state.accepted}
    if not may.get(code) or state.climbs <= 0:
        return False
    if item.attempt == state.attempt:  # else another item of the same batch was refused for the same reason
        state.attempt = (state.attempt or 1) + 1
        state.climbs -= 1
    return True
