"""Notifications in Redis: one shard of the log of their own, and what is stored for users; see ``redis_keys``.

Every node follows that shard from its start, so the inboxes stand in its memory. What is kept of them in Redis is for
nodes that start: for each stored notification its text and the users that have not acknowledged it, and an index by
time. All of it goes by itself after a day.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from protocol.update import Update
from server.brokers.base import Notify
from server.brokers.keys import digest_of, fingerprint_of_notice
from server.brokers.redis_calls import Call, Change
from server.brokers.redis_client import Client, Script
from server.brokers.redis_keys import (
    CHANNELS,
    KEY_MS,
    LOGS,
    META,
    NOTICES_SHARD,
    PREFIX,
    NoticeWrite,
    decode_write,
    encode_write,
    idempotency_key,
    update_of,
)
from server.inbox import KEPT_S, Place

# Calls that are about notifications keep their order like those to one job; no job can have this id.
HELD: Final = "/notices"
STORED: Final = f"{PREFIX}stored".encode()
_KEPT_MS: Final = int(KEPT_S * 1000)
_KEYS: Final = (META, LOGS[NOTICES_SHARD], CHANNELS[NOTICES_SHARD])
# Stored notifications read at once: they may have 64 KiB each.
_PAGE: Final = 100
# Places given up at once.
_DROP: Final = 1000

# KEYS: meta, the log, the channel, and the idempotency key if there is one.
# ARGV: epoch, at_ms, max_updates, PUBLISH or SPUBLISH, fingerprint, the write, then the users for whom it is stored.
# Answers, like those of redis_keys.PUBLISH: DONE offset at_ms created; OTHER_EPOCH epoch; REPEATED value offset false.
NOTIFY: Final = Script(
    """
local call, meta, prefix = redis.call, KEYS[1], string.sub(KEYS[1], 1, -5)
local state = call('HMGET', meta, 'epoch', 'offset', 'at', 'last:SHARD')
if state[1] ~= ARGV[1] then return {1, state[1]} end
if KEYS[4] then
  local value = call('GET', KEYS[4])
  if value then return {2, value, tonumber(state[2]), false} end
end
local stamp, at = tonumber(state[2]) + 1, math.max(tonumber(state[3]), tonumber(ARGV[2]))
call('HSET', meta, 'offset', stamp, 'at', at, 'last:SHARD', stamp)
if ARGV[7] then
  local notice, inbox, stored = prefix .. 'notice:' .. stamp, prefix .. 'inbox:' .. stamp, prefix .. 'stored'
  call('SET', notice, at .. '\\n' .. ARGV[6], 'PX', KEPT)
  call('DEL', inbox)
  call('SADD', inbox, unpack(ARGV, 7))
  call('PEXPIRE', inbox, KEPT)
  call('ZREMRANGEBYSCORE', stored, '-inf', at - KEPT)
  call('ZADD', stored, at, stamp)
end
if KEYS[4] then call('SET', KEYS[4], ARGV[5] .. ' / ' .. stamp .. ' 0', 'PX', KEY_MS) end
local pack = cmsgpack.pack
local message = '\\152' .. pack(ARGV[1], tonumber(state[4] or 0), stamp, stamp, at) .. '\\145' .. pack(stamp) .. '\\144'
  .. '\\145' .. ARGV[6]
call('XADD', KEYS[2], 'MINID', '~', math.max(0, stamp - ARGV[3]), stamp .. '-0', 'm', message)
call(ARGV[4], KEYS[3], message)
return {0, stamp, at, stamp}
""".replace("SHARD'", f"{NOTICES_SHARD}'")
    .replace("KEPT", str(_KEPT_MS))
    .replace("KEY_MS", str(KEY_MS))
)

# Let go of stored ones. It takes an offset without an entry, so that all nodes learn of it in the log's order.
# KEYS: meta, the log, the channel. ARGV: epoch, max_updates, PUBLISH or SPUBLISH ("" to tell nobody), then places as
# <user>/<offset>. Answers: DONE, or OTHER_EPOCH.
LET_GO: Final = Script(
    """
local call, meta, prefix = redis.call, KEYS[1], string.sub(KEYS[1], 1, -5)
local state = call('HMGET', meta, 'epoch', 'offset', 'at', 'last:SHARD')
if state[1] ~= ARGV[1] then return {1, state[1]} end
local stamp = tonumber(state[2]) + 1
if ARGV[3] ~= '' then call('HSET', meta, 'offset', stamp, 'last:SHARD', stamp) end
local gone = {}
for i = 4, #ARGV do
  local user, offset = string.match(ARGV[i], '^([^/]*)/(%d+)$')
  local inbox = prefix .. 'inbox:' .. offset
  call('SREM', inbox, user)
  if call('EXISTS', inbox) == 0 then
    call('DEL', prefix .. 'notice:' .. offset)
    call('ZREM', prefix .. 'stored', offset)
  end
  gone[#gone + 1] = ARGV[i]
end
if ARGV[3] ~= '' then
  local pack = cmsgpack.pack
  local message = '\\152' .. pack(ARGV[1], tonumber(state[4] or 0), stamp, stamp, tonumber(state[3])) .. '\\144'
    .. pack(gone) .. '\\144'
  call('XADD', KEYS[2], 'MINID', '~', math.max(0, stamp - ARGV[2]), stamp .. '-0', 'm', message)
  call(ARGV[3], KEYS[3], message)
end
return {0}
""".replace("SHARD'", f"{NOTICES_SHARD}'")
)

# KEYS: stored. ARGV: from which one on, how many. Answers: how many there were, and of each that is left its offset,
# text and users.
_LOAD: Final = Script("""
local prefix, answer = string.sub(KEYS[1], 1, -7), {}
local offsets = redis.call('ZRANGE', KEYS[1], ARGV[1], ARGV[1] + ARGV[2] - 1)
answer[1] = #offsets
for _, offset in ipairs(offsets) do
  local text = redis.call('GET', prefix .. 'notice:' .. offset)
  if text then
    answer[#answer + 1] = tonumber(offset)
    answer[#answer + 1] = text
    answer[#answer + 1] = redis.call('SMEMBERS', prefix .. 'inbox:' .. offset)
  end
end
return answer
""")


def decide_notice(call: Call, operation: Notify, rev: str, now_ms: int) -> None:
    """Fill in what a notification writes."""
    entry = operation.notice.entry(0, now_ms)
    call.shard = NOTICES_SHARD
    call.changes.append(Change("", None, None, entry, True, "", rev))


def address_notice(call: Call, operation: Notify) -> None:
    """Fill in a notification's idempotency key."""
    if operation.key is not None:
        call.digest = digest_of(operation.sub, operation.key)
        call.fingerprint = fingerprint_of_notice(operation.notice).hex().encode()


def fill_in_notice(call: Call, operation: Notify, max_updates: int, publish: str) -> None:
    """Fill in what writes a notification."""
    (change,) = call.changes
    entry, store = change.update, operation.notice.store
    write = encode_write(write_of_notice(entry, change.rev, store=store))
    users = operation.notice.target.ids if store else ()
    call.script, call.keys = NOTIFY, (*_KEYS, idempotency_key(call.digest)) if call.digest else _KEYS
    call.arguments = [call.epoch, entry.at_ms, max_updates, publish, call.fingerprint, write, *users]


def write_of_notice(entry: Update, rev: str, *, store: bool) -> NoticeWrite:
    """What is written of a notification."""
    return NoticeWrite("", "", rev, True, entry.type, entry.kind, "", 0, True, entry.body, None, entry.targets, store)


def store_commands(
    notice: Update, users: Sequence[str], rev: str, now_ms: int
) -> Iterator[tuple[bytes | str | int, ...]]:
    """What keeps a notification for these users as long as it would have been kept; for an import."""
    left_ms = notice.at_ms + _KEPT_MS - now_ms
    if left_ms <= 0 or not users:
        return
    text = b"%d\n%b" % (notice.at_ms, encode_write(write_of_notice(notice, rev, store=True)))
    inbox = f"{PREFIX}inbox:{notice.offset}".encode()
    yield "SET", f"{PREFIX}notice:{notice.offset}".encode(), text, "PX", left_ms
    yield "DEL", inbox
    yield "SADD", inbox, *users
    yield "PEXPIRE", inbox, left_ms
    yield "ZADD", STORED, notice.at_ms, notice.offset


def fill_in_acknowledgement(call: Call, max_updates: int, publish: str) -> None:
    """Fill in what lets go of an acknowledgement's places; it does no harm to send it twice."""
    call.script, call.keys, call.arguments = LET_GO, _KEYS, [call.epoch, max_updates, publish, *call.places]


def texts_of(places: Iterable[Place]) -> list[str]:
    """Places as ``LET_GO`` is given them; the opposite of ``places_of``."""
    return [f"{place.user}/{place.offset}" for place in places]


def drop(client: Client, epoch: str, places: Sequence[Place]) -> None:
    """Tell Redis of stored ones that every node lets go of by itself. Raises RedisClientError."""
    texts = texts_of(places)
    for start in range(0, len(texts), _DROP):
        client.send_script(LET_GO, _KEYS, [epoch, 0, "", *texts[start : start + _DROP]])


def places_of(gone: Iterable[str]) -> list[Place]:
    """What a message says is let go of."""
    return [Place(user, int(offset)) for user, _, offset in (text.partition("/") for text in gone)]


async def load_stored(client: Client) -> list[tuple[Update, list[str]]]:
    """Everything that is stored, oldest first, and for whom. Raises RedisClientError, RedisError."""
    found: dict[int, tuple[Update, list[str]]] = {}
    start = 0
    while True:
        count, *rows = await client.call_script(_LOAD, [STORED], [start, _PAGE])
        for offset, text, users in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
            at_ms, _, write = text.partition(b"\n")
            found[offset] = update_of(decode_write(write), offset, int(at_ms)), [user.decode() for user in users]
        if count < _PAGE:
            return [found[offset] for offset in sorted(found)]
        # Some may go meanwhile, and others move up: the pages overlap.
        start += _PAGE // 2
