"""Updates from the stream ``statuswire:ingest``: kept by Redis until they were accepted, or set aside.

A consumer group, one consumer a node, and by lease one of them reads: entries of one job that two nodes took in turn
could overtake each other. One node takes in more than a Redis can publish, so nothing is lost by it. Whoever gets the
lease begins with all that others have left unacknowledged, in the order of the stream.

An entry is acknowledged after what is in it is kept. In between lies a crash: then it is published again under the
same idempotency key, its id, and counts once.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import trio
from msgspec import UNSET, Raw

from protocol.errors import ApiError
from protocol.fields import MAX_UPDATE
from protocol.resp import RedisError
from server.brokers.base import Accepted
from server.brokers.keys import digest_of
from server.brokers.redis_client import RedisClientError, RedisUrl, Reply, Script, make_client
from server.brokers.redis_keys import PREFIX
from server.brokers.redis_lease import Lease
from server.ingest.intake import (
    AT_ONCE,
    Complaints,
    Counters,
    Item,
    TurnLostError,
    postponed,
    publish,
    read_item,
)
from server.ingest.spent import Spent
from server.node import Node

STREAM: Final = b"statuswire:ingest"
DEAD: Final = b"statuswire:ingest:dead"
GROUP: Final = "statuswire"
FIELD: Final = b"data"
MAX_ARRAY: Final = 8 * 1024 * 1024  # bytes of an array of updates
# In the dead-letter stream; the oldest go.
MAX_DEAD: Final = 10_000

LEASE_KEY: Final = f"{PREFIX}ingest:stream".encode()
LEASE_S: Final = 3.0
_ASK_S: Final = 0.75
# Below what a silent connection is given (``Options.silence_s``); also how long a stop may have to wait.
_BLOCK_MS: Final = 1000
_BLOCK_BRIEFLY_MS: Final = 100
# Entries that wait for what will pass; while there are so many, no more are read.
_MAX_POSTPONED: Final = 5000
_AGAIN_S: Final = 0.25
_TROUBLE_S: Final = 0.5
# An entry that was handed out and never heard of again: its reader's, or one that a human has taken.
_STRAY_MS: Final = 30_000
_STRAY_EVERY_S: Final = 10.0
# Handed out so often without being acknowledged: by itself from then on, and at last not any more, as it may be
# what kills those who take it.
_ALONE_AFTER: Final = 3
MAX_DELIVERIES: Final = 10
# A failover can bring an acknowledged entry back, a frozen node can wake with one in hand.
_SPENT_S: Final = 60.0
# ``sub`` of keys that are ids of entries: a scope of their own, beside that of ``eventId``.
_SUB: Final = "(redis stream)"

_log: Final = logging.getLogger("statuswire.ingest")
_split = msgspec.json.Decoder(list[Raw]).decode

# KEYS: the stream. ARGV: the group, ids. Acknowledged entries are of no use to anybody, unless others read it too.
_ACKNOWLEDGE: Final = Script("""
local stream, ids = KEYS[1], {unpack(ARGV, 2)}
if redis.call('EXISTS', stream) == 0 then return 0 end
redis.call('XACK', stream, ARGV[1], unpack(ids))
if #redis.call('XINFO', 'GROUPS', stream) > 1 then return 0 end
return redis.call('XDEL', stream, unpack(ids))
""")

# KEYS: the stream. ARGV: the group, and a consumer that stays. The others leave if they have left nothing behind.
_TIDY: Final = Script("""
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  if consumer[2] ~= ARGV[2] and consumer[4] == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer[2])
  end
end
return 0
""")


class _Entry:
    """One entry: its updates, and how many of them are not settled yet."""

    __slots__ = ("id", "items", "left", "spent")

    def __init__(self, entry_id: bytes) -> None:
        self.id = entry_id
        self.items: list[Item] = []
        self.left = 0
        self.spent: list[bytes] = []


class _Dead(msgspec.Struct):
    """What is to be set aside, and why."""

    entry_id: bytes
    data: bytes
    code: str
    message: str


class RedisStream:
    """This node's part in reading the stream.

    Args:
        node: with a Redis store that was started.
        name: this node's; that of its consumer.
        url: for a connection of its own, as reading blocks it.

    Attributes:
        counters: what came of it here.
        done: set when everything that was read is finished after ``stop``.
    """

    def __init__(self, node: Node, name: str, url: RedisUrl) -> None:
        assert node.shared is not None
        self.counters = Counters()
        self.done = trio.Event()
        self._node = node
        self._name = name
        self._client = node.shared.client
        self._reader = make_client(url)
        self._lease = Lease(self._client, LEASE_KEY, name, LEASE_S)
        self._spent = Spent(self._client, _SPENT_S)
        self._complaints = Complaints("stream")
        self._postponed: deque[tuple[_Entry, Item]] = deque()
        self._in_hand: set[bytes] = set()
        self._stopping = False
        self._wake = trio.Event()

    @property
    def takes(self) -> bool:
        """Whether it is this node that reads."""
        return self._lease.held

    async def run(self) -> None:
        """Take in, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reader.run)
            nursery.start_soon(self._spent.run)
            nursery.start_soon(self._keep_lease)
            nursery.start_soon(self._read_for_ever)

    def stop(self) -> None:
        """Read no more, and finish what was read; ``done`` says when."""
        self._stopping = True
        self._wake.set()

    async def _keep_lease(self) -> None:
        while not self.done.is_set():
            if self._lease.held or not self._stopping:
                try:
                    await self._lease.hold()
                except (RedisClientError, RedisError):
                    pass  # ours until it runs out
                else:
                    self._wake.set()
            with trio.move_on_after(_ASK_S):
                await self.done.wait()

    # Reading

    async def _read_for_ever(self) -> None:
        while not self._stopping:
            if not self.takes:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            try:
                await self._read_while_held()
            except TurnLostError:
                pass  # whoever takes now has claimed what was in hand
            except (RedisClientError, RedisError) as error:
                self._complaints.add("ingest_interrupted", str(error))
            except Exception:
                _log.exception("entries could not be taken in")
            # What is in hand is left where it is: it is ours, or the next one's, when it is claimed.
            self._postponed.clear()
            self._in_hand.clear()
            await trio.sleep(_TROUBLE_S if self.takes and not self._stopping else 0)
        if self.takes:
            self._tidy(but="")
        self._lease.release()
        self.done.set()

    async def _read_while_held(self) -> None:
        await self._make_group()
        await self._claim(0)
        self._tidy(but=self._name)
        look_again = trio.current_time() + _STRAY_EVERY_S
        while self.takes and not self._stopping:
            if self._postponed:
                await self._take([])
                if self._postponed:
                    await trio.sleep(_AGAIN_S)
            if trio.current_time() >= look_again:
                await self._claim(_STRAY_MS)
                look_again = trio.current_time() + _STRAY_EVERY_S
            if len(self._postponed) < _MAX_POSTPONED:
                await self._take(await self._read())

    async def _make_group(self) -> None:
        try:
            # From the beginning: what was put there before any node ran waits for us.
            await self._client.call("XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM")
        except RedisError as error:
            if error.code != "BUSYGROUP":
                raise

    async def _read(self) -> list[_Entry]:
        block = _BLOCK_BRIEFLY_MS if self._postponed else _BLOCK_MS
        command = ("XREADGROUP", "GROUP", GROUP, self._name, "COUNT", AT_ONCE, "BLOCK", block, "STREAMS", STREAM, ">")
        answer = await self._reader.call(*command, patience=LEASE_S)
        return [] if not answer else await self._open_all(answer[0][1], {})

    async def _claim(self, idle_ms: int) -> None:
        """Take what was handed out and not acknowledged, in the order of the stream."""
        start = "-"
        while self.takes and not self._stopping:
            rows = await self._client.call("XPENDING", STREAM, GROUP, "IDLE", idle_ms, start, "+", AT_ONCE)
            deliveries = {row[0]: int(row[3]) + 1 for row in rows if row[0] not in self._in_hand}
            if deliveries:
                claimed = await self._client.call("XCLAIM", STREAM, GROUP, self._name, 0, *deliveries)
                entries = [entry for entry in claimed if entry and entry[1]]
                # Somebody has deleted those; before 7.0 they stay pending for ever.
                gone = deliveries.keys() - {entry[0] for entry in entries}
                await self._acknowledge([_Entry(entry_id) for entry_id in gone])
                opened = await self._open_all(entries, deliveries)
                if all(deliveries[entry.id] <= _ALONE_AFTER for entry in opened):
                    await self._take(opened)
                else:
                    for entry in opened:
                        await self._take([entry])
            if len(rows) < AT_ONCE:
                return
            start = "(" + rows[-1][0].decode()

    def _tidy(self, *, but: str) -> None:
        with suppress(RedisClientError):  # the next one does it
            self._client.send_script(_TIDY, [STREAM], [GROUP, but])

    # What is in an entry

    async def _open_all(self, entries: Iterable[Sequence[Any]], deliveries: dict[bytes, int]) -> list[_Entry]:
        """Read entries; what cannot be read is set aside."""
        opened: list[_Entry] = []
        dead: list[_Dead] = []
        empty: list[_Entry] = []
        for entry_id, pairs in entries:
            entry = _Entry(entry_id)
            values = [value for name, value in zip(pairs[::2], pairs[1::2], strict=True) if name == FIELD]
            if deliveries.get(entry_id, 1) > MAX_DELIVERIES:
                message = f"it was handed out {deliveries[entry_id]} times and never acknowledged"
                dead.append(_Dead(entry_id, b"".join(values), "redelivered", message))
            elif not values:
                known = ", ".join(name.decode(errors="replace")[:64] for name in pairs[: 2 * 8 : 2])
                self.counters.received += 1
                error = ApiError(422, "no_data", f"there is no field data in it, only {known}")
                dead.append(self._refuse(entry_id, b"", error))
            else:
                for value in values:
                    dead += self._open(entry, value)
            entry.left = len(entry.items)
            self._in_hand.add(entry_id)
            (opened if entry.items else empty).append(entry)
        await self._bury(dead)
        await self._acknowledge(empty)
        return opened

    def _open(self, entry: _Entry, value: bytes) -> list[_Dead]:
        """One ``data`` field: an update, or an array of them."""
        updates: Sequence[bytes | Raw] = [value]
        if len(value) > MAX_ARRAY:
            self.counters.received += 1
            message = f"an entry may have {MAX_ARRAY} bytes, this one has {len(value)}"
            return [self._refuse(entry.id, value, ApiError(413, "payload_too_large", message))]
        if value.lstrip(b" \t\r\n")[:1] == b"[":
            try:
                updates = _split(value)
            except (msgspec.DecodeError, RecursionError) as error:
                self.counters.received += 1
                return [self._refuse(entry.id, value, ApiError(400, "malformed_json", str(error)))]
        dead = []
        for update in updates:
            data = bytes(update)
            self.counters.received += 1
            try:
                item = read_item(data)
            except ApiError as error:
                dead.append(self._refuse(entry.id, data, error))
                continue
            self.counters.trimmed += item.trimmed
            if item.fields.event_id is UNSET:
                item.sub = _SUB
                item.key = f"{entry.id.decode()}#{len(entry.items)}"
            entry.items.append(item)
        return dead

    def _refuse(self, entry_id: bytes, data: bytes, error: ApiError) -> _Dead:
        self.counters.rejected += 1
        self._complaints.refused(error, entry=entry_id.decode())
        return _Dead(entry_id, data, error.code, error.message)

    # Taking up

    async def _take(self, entries: Sequence[_Entry]) -> None:
        """Publish what waits and what is in these entries, and acknowledge what is settled by that.

        Raises:
            TurnLostError: before all of it was published.
        """
        todo = [*self._postponed, *((entry, item) for entry in entries for item in entry.items)]
        if not todo:
            return
        await publish(self._node, [item for _, item in todo], lambda: self.takes)
        again = postponed([item for _, item in todo])
        self._postponed = deque((entry, item) for entry, item in todo if id(item) in again)
        settled: list[_Entry] = []
        dead: list[_Dead] = []
        for entry, item in todo:
            if id(item) in again:
                continue
            outcome = item.outcome
            if isinstance(outcome, ApiError):
                dead.append(self._refuse(entry.id, item.data, outcome))
            elif isinstance(outcome, Accepted):
                if outcome.duplicate:
                    self.counters.duplicates += 1
                else:
                    self.counters.accepted += 1
                if item.key is not None:
                    entry.spent.append(digest_of(item.sub, item.key))
            entry.left -= 1
            if not entry.left:
                settled.append(entry)
        await self._bury(dead)
        await self._acknowledge(settled)

    async def _acknowledge(self, entries: Sequence[_Entry]) -> None:
        if not entries:
            return
        ids = [entry.id for entry in entries]
        await self._insist(lambda: [self._client.send_script(_ACKNOWLEDGE, [STREAM], [GROUP, *ids])])
        self._in_hand.difference_update(ids)
        for entry in entries:
            self._spent.add(entry.spent)

    async def _bury(self, dead: Sequence[_Dead]) -> None:
        """Set aside what will never be accepted. It comes before its acknowledgement, so a crash may do it twice."""
        if not dead:
            return
        await self._insist(
            lambda: [
                self._client.send(
                    *("XADD", DEAD, "MAXLEN", "~", MAX_DEAD, "*", "entry", one.entry_id, "code", one.code),
                    *("message", one.message, "data", one.data[:MAX_UPDATE]),
                )
                for one in dead
            ]
        )
        self.counters.dead += len(dead)

    async def _insist(self, send: Callable[[], list[Reply]]) -> None:
        """Send until Redis has it, as long as it is ours to do.

        Raises:
            RedisClientError, RedisError: it is not any more, or Redis will never take it.
        """
        while True:
            try:
                for reply in send():
                    await reply.wait()
                return
            except (RedisClientError, RedisError) as error:
                if not self.takes or (isinstance(error, RedisError) and error.code in ("WRONGTYPE", "NOGROUP")):
                    raise
                self._complaints.add("ingest_interrupted", str(error))
            await trio.sleep(_AGAIN_S)
