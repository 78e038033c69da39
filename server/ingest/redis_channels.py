"""Updates from the pub/sub channels of Redis: every node hears all of them, each is accepted once.

Pub/sub keeps nothing and numbers nothing, so a node that was chosen to listen alone would lose what is published while
another one takes its place. Therefore every node listens and holds what it heard; one, by lease, takes it up at once
and says, several times a second, how far it has come; the others forget that far. If it dies, the next one takes up
all that it holds. What the dead one had accepted is found to be a repetition: acceptance and idempotency key are one
step in Redis.

The word of how far the holder is, the *beat*, carries Redis' time and comes over the same connection as the messages.
So it also says when a message was published, alike on all nodes and however late one of them reads it, and from that
follows the message's name: byte-equal ones within the window have one name, which is their key.
"""

from __future__ import annotations

import logging
from collections import deque
from hashlib import blake2b
from typing import Final

import trio
from msgspec import UNSET

from protocol.errors import ApiError
from protocol.resp import RedisError
from server.brokers.base import Accepted
from server.brokers.keys import digest_of
from server.brokers.redis_client import RedisClientError, RedisUrl, Script
from server.brokers.redis_keys import PREFIX
from server.brokers.redis_lease import Lease
from server.brokers.redis_listener import Listener
from server.ingest.intake import AT_ONCE, Complaints, Counters, Item, postponed, publish, read_item
from server.ingest.spent import Spent
from server.node import Node

STATUS: Final = b"job_status_updates"
PROGRESS: Final = b"job_progress_updates"
COMPLETION: Final = b"job_completion_updates"
CHANNELS: Final = (STATUS, PROGRESS, COMPLETION)

# Byte-equal messages without ``eventId`` count as one for so long after the first.
WINDOW_S: Final = 5.0
# A node that reads a message later than this leaves it to others: no name is remembered for longer.
LATE_S: Final = 15.0
# After its acceptance a name may still be asked for by a late node, which then publishes for up to ten seconds.
_SPENT_S: Final = LATE_S + 15.0

LEASE_KEY: Final = f"{PREFIX}ingest:channels".encode()
LEASE_S: Final = 2.0
_BEAT_S: Final = 0.25
# No beat for so long: see whether the lease is free.
_QUIET_S: Final = 1.0
# Beats are sent but not heard: this connection is deaf (a cut cluster bus, a master that is none any more).
_DEAF_S: Final = 4.0
# Across the masters of a cluster beats and messages come in slightly different orders to different nodes.
_SLACK_MS: Final = 1000

# What a node holds; the oldest goes first.
MAX_HELD: Final = 50_000
MAX_HELD_BYTES: Final = 32 * 1024 * 1024
_BYTES_AT_ONCE: Final = 1024 * 1024
_AGAIN_S: Final = 0.25

_log: Final = logging.getLogger("statuswire.ingest")

# One name for byte-equal messages: when the first of them was published. Naming is not claiming: who names and dies
# takes nothing away.
# KEYS: one for each message. ARGV: window, LATE, and when each was published (all in milliseconds).
# Answers: the name of each, 0 if it is too late for one.
_NAME: Final = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local window, late = tonumber(ARGV[1]), tonumber(ARGV[2])
local answer = {}
for i, key in ipairs(KEYS) do
  local at = tonumber(ARGV[i + 2])
  if now - at > late then
    answer[i] = 0
  else
    local named = tonumber(redis.call('GET', key) or '')
    if named and at - named < window and named - at <= late then
      answer[i] = named
    else
      redis.call('SET', key, ARGV[i + 2], 'PX', late + window + 1000)
      answer[i] = at
    end
  end
end
return answer
""")


class _Heard:
    """A message.

    Attributes:
        at_ms: the beat before it, 0 while none was heard yet.
        item: once it was read.
        meaning: what the channel added to it then.
    """

    __slots__ = ("at_ms", "channel", "item", "meaning", "payload")

    def __init__(self, at_ms: int, channel: bytes, payload: bytes) -> None:
        self.at_ms = at_ms
        self.channel = channel
        self.payload = payload
        self.item: Item | None = None
        self.meaning = ""


def name_key(digest: bytes) -> bytes:
    """Where the name of byte-equal messages is."""
    return f"{PREFIX}heard:{digest.hex()}".encode()


class RedisChannels:
    """This node's ear on the three channels.

    Args:
        node: with a Redis store that was started.
        name: this node's.
        url: for a connection of its own.

    Attributes:
        window_ms: see ``WINDOW_S``; the same on all nodes.
        counters: what came of it here. Only the node that takes a message up counts it.
        done: set when everything was finished after ``stop``.
    """

    def __init__(self, node: Node, name: str, url: RedisUrl) -> None:
        assert node.shared is not None
        self.counters = Counters()
        self.done = trio.Event()
        self._node = node
        self._name = name
        self.window_ms = round(WINDOW_S * 1000)
        self._client = node.shared.client
        self._lease = Lease(self._client, LEASE_KEY, name, LEASE_S)
        self._spent = Spent(self._client, _SPENT_S)
        self._complaints = Complaints("channels")
        # Channels know no databases, but each database is an installation of its own.
        self._beats = f"{PREFIX}beat:{url.database}".encode()
        self._all = frozenset((*CHANNELS, self._beats))
        self._listener = Listener(
            self._all, url, on_message=self._hear, on_subscribed=self._listening, on_lost=self._deafened
        )
        self._held: deque[_Heard] = deque()
        self._held_bytes = 0
        self._orphans: deque[_Heard] = deque()  # what the holder may not have heard
        self._taking: list[_Heard] = []
        self._beat_ms = 0  # the last beat
        self._since_ms = 0  # everything since this one was heard, 0 before the first
        self._heard_at = 0.0  # when the last one came, or the listening began
        self._stopping = False
        self._wake = trio.Event()
        self._hurry = trio.Event()

    @property
    def takes(self) -> bool:
        """Whether this node takes up what is heard."""
        return self._lease.held and self._since_ms > 0

    @property
    def listening(self) -> bool:
        """Whether this node hears everything."""
        return self._since_ms > 0

    async def run(self) -> None:
        """Take in, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listener.run)
            nursery.start_soon(self._keep_lease)
            nursery.start_soon(self._spent.run)
            nursery.start_soon(self._take_for_ever)

    def stop(self) -> None:
        """Listen no more, and finish what was heard; ``done`` says when."""
        # What is heard from now on is left to others, so no later beat may say that it was taken up here.
        self._stopping = True
        self._listener.unsubscribe(self._all)
        self._wake.set()

    # Listening

    def _listening(self, channels: frozenset[bytes]) -> None:
        if self._listener.subscribed >= self._all:
            self._heard_at = trio.current_time()
            self._hurry.set()

    def _deafened(self, channels: frozenset[bytes]) -> None:
        """Something will be missed: whoever hears it must be able to take over."""
        self._since_ms = 0
        for heard in self._held:
            heard.at_ms = heard.at_ms or self._beat_ms
        while self._held and not self._held[-1].at_ms:  # nobody can say when those were published
            self._held_bytes -= len(self._held.pop().payload)
        if self._lease.held and not self._stopping:
            self._lease.release()

    def _hear(self, channel: bytes, payload: bytes) -> None:
        if self._stopping:
            return
        if channel == self._beats:
            self._take_beat(payload)
            return
        self._held.append(_Heard(self._beat_ms if self._since_ms else 0, channel, payload))
        self._held_bytes += len(payload)
        self._make_room()
        self._wake.set()

    def _take_beat(self, payload: bytes) -> None:
        words = payload.split(b" ")
        if len(words) != 4 or not (words[0].isdigit() and words[2].isdigit() and words[3].isdigit()):
            return
        now_ms = int(words[0])
        self._heard_at = trio.current_time()
        self._beat_ms = now_ms
        if not self._since_ms and self._listener.subscribed >= self._all:
            self._since_ms = now_ms
            for heard in reversed(self._held):
                if heard.at_ms:
                    break
                heard.at_ms = now_ms
            self._wake.set()
        if words[1] != self._name.encode():
            self._forget(int(words[2]), int(words[3]))

    def _forget(self, since_ms: int, settled_ms: int) -> None:
        """The holder, which has heard all since ``since_ms``, has settled all that was published before."""
        held = self._held
        while held and 0 < held[0].at_ms < settled_ms - _SLACK_MS:
            heard = self._pop()
            if heard.at_ms < since_ms + _SLACK_MS:
                self._orphans.append(heard)
                self._wake.set()

    def _make_room(self) -> None:
        while len(self._held) > MAX_HELD or self._held_bytes > MAX_HELD_BYTES:
            self._pop()
            if self.takes:
                self.counters.dropped += 1
                self._complaints.add("ingest_dropped", "more is published than can be accepted")

    def _pop(self) -> _Heard:
        heard = self._held.popleft()
        self._held_bytes -= len(heard.payload)
        return heard

    # The lease

    async def _keep_lease(self) -> None:
        while True:
            if self._listener.subscribed >= self._all or self._stopping:
                asks = self._lease.held or self._quiet_s() > _QUIET_S or not self._since_ms
                if asks and await self._beat():
                    if self._quiet_s() > _DEAF_S and not self._stopping:
                        self._heard_at = trio.current_time()
                        self._listener.drop("nothing of what is published comes through")
                    self._wake.set()
            with trio.move_on_after(_BEAT_S):
                await self._hurry.wait()
            self._hurry = trio.Event()

    def _quiet_s(self) -> float:
        return trio.current_time() - self._heard_at

    async def _beat(self) -> bool:
        """Take or keep the lease, and say how far we are. False if Redis does not answer."""
        if self._stopping and not self._lease.held:
            return False
        try:
            await self._lease.hold(self._beats, f"{self._name} {self._since_ms} {self._settled()}")
        except (RedisClientError, RedisError):
            return False
        return True

    def _settled(self) -> int:
        """Everything before this beat has been taken up, as far as it was heard."""
        if not self._since_ms:
            return 0
        if self._taking:
            return self._taking[0].at_ms
        return self._held[0].at_ms if self._held else self._beat_ms

    # Taking up

    async def _take_for_ever(self) -> None:
        while True:
            batch = self._next()
            if not batch:
                if self._stopping and not self.done.is_set():
                    self._lease.release()
                    self.done.set()
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            try:
                left = await self._take(batch)
            except Exception:
                _log.exception("messages could not be taken in")
                self.counters.dropped += len(batch)
                left = []
            finally:
                self._taking = []
            if left:
                self._held.extendleft(reversed(left))
                self._held_bytes += sum(len(heard.payload) for heard in left)
                self._make_room()
                await trio.sleep(_AGAIN_S)

    def _next(self) -> list[_Heard]:
        if self._orphans:
            return [self._orphans.popleft() for _ in range(min(AT_ONCE, len(self._orphans)))]
        if not self.takes and not (self._stopping and self._lease.held):
            return []
        batch: list[_Heard] = []
        self._taking = batch
        new = size = 0
        while self._held and new < AT_ONCE and size < _BYTES_AT_ONCE:
            heard = self._pop()
            batch.append(heard)
            # What waits for something that will pass must not hold up what may bring it about.
            new += heard.item is None
            size += len(heard.payload) if heard.item is None else 0
        return batch

    async def _take(self, batch: list[_Heard]) -> list[_Heard]:
        """Publish messages. Returns those that have to be tried again."""
        known = [heard for heard in batch if heard.item is not None or self._read(heard)]
        ready = await self._name_all(known)
        if ready is None:
            return known
        items = [heard.item for heard in ready if heard.item is not None]
        if not items:
            return []
        await publish(self._node, items)
        again = postponed(items)
        spent: list[bytes] = []
        left: list[_Heard] = []
        for heard, item in zip(ready, items, strict=True):
            outcome = item.outcome
            if isinstance(outcome, Accepted):
                if outcome.duplicate:
                    self.counters.duplicates += 1
                else:
                    self.counters.accepted += 1
                    if item.key is not None:
                        spent.append(digest_of(item.sub, item.key))
            elif id(item) in again:
                left.append(heard)
            elif isinstance(outcome, ApiError):
                self._refuse(heard, outcome)
        self._spent.add(spent)
        return left

    def _read(self, heard: _Heard) -> bool:
        self.counters.received += 1
        try:
            item = read_item(heard.payload)
        except ApiError as error:
            self._refuse(heard, error)
            return False
        self.counters.trimmed += item.trimmed
        fields = item.fields
        if heard.channel == COMPLETION and fields.status is UNSET:
            fields.status = "failed" if isinstance(fields.error, str) else "completed"
            heard.meaning = fields.status
        heard.item = item
        return True

    def _refuse(self, heard: _Heard, error: ApiError) -> None:
        self.counters.rejected += 1
        self._complaints.refused(error, channel=heard.channel.decode())

    async def _name_all(self, batch: list[_Heard]) -> list[_Heard] | None:
        """Give those without ``eventId`` a key. Returns those that are not too late; None if Redis does not say."""
        keys: list[bytes] = []
        digests: list[bytes] = []
        unnamed: list[_Heard] = []
        for heard in batch:
            assert heard.item is not None
            if heard.item.key is None and heard.item.fields.event_id is UNSET:
                # What the channel adds is a part of it: equal bytes may mean different things.
                digest = blake2b(f"{heard.meaning}\n".encode() + heard.payload, digest_size=16).digest()
                digests.append(digest)
                keys.append(name_key(digest))
                unnamed.append(heard)
        if not unnamed:
            return batch
        arguments = (self.window_ms, round(LATE_S * 1000), *(heard.at_ms for heard in unnamed))
        try:
            names = await self._client.call_script(_NAME, keys, arguments)
        except (RedisClientError, RedisError):
            return None
        late: set[int] = set()
        for heard, digest, name in zip(unnamed, digests, names, strict=True):
            assert heard.item is not None
            if name:
                heard.item.key = f"{digest.hex()}@{name}"
            else:
                late.add(id(heard))
        if late:
            self.counters.dropped += len(late)
            self._complaints.add("ingest_dropped", "they could not be accepted in time")
        return [heard for heard in batch if id(heard) not in late]
