"""What the Redis broker keeps where, and the scripts that touch it. Everything there is to know of Redis' side.

All keys share the hash tag ``{statuswire}``: one script may touch any of them, in a cluster too. Jobs are spread over
``SHARDS`` by their owner; a parent and its parts have one owner, so one shard.

- ``meta``, a hash: ``epoch``, ``schema``, ``shards``; ``offset`` and ``at``: of the newest entry (time in unix
  milliseconds); ``last:<k>``: offset of the newest entry of shard k; ``cut:<k>``: up to where they were too old.
- ``jobs:<k>``, a hash: job id -> ``<rev> <created> <offset> <at> <stamp>\n`` and a msgpack ``Write``.
- ``where``, a hash: job id -> shard.
- ``probe``: written once a second by those who were refused, for a second.
- ``importing``: the name of an import that is under way, for half a minute; ``importing`` in ``meta`` stays after it.
- ``log:<k>``, a stream: one entry ``<stamp>-0`` for every call that changed something, with the message in field ``m``.
- ``shard:<k>``, a channel: the same messages, live.
- ``key:<digest>``: an idempotency key's first answer, for ten minutes.
- ``log:16``, ``shard:16``: the same for notifications.
- ``notice:<offset>``: a stored notification, ``<at>\n`` and its ``Write``; ``inbox:<offset>``, a set: the users that
  have not acknowledged it; ``stored``, a sorted set: these offsets by time.
- ``leases``, a sorted set: job id -> when it runs out, in Redis' own time (unix milliseconds).
- ``ended``, a sorted set: ended jobs by when they ended: the oldest make room for new ones.

``rev`` is a token that the writing node makes up: it names a state before that state is in Redis, so that updates of
one job can follow each other without waiting. ``stamp`` is the highest offset that the writing call gave: it orders
the states of a job, those without an entry of their own (a parent's sums) too.
"""

from __future__ import annotations

from typing import Final, Literal
from zlib import crc32

import msgspec

from protocol.notice import notice_entry
from protocol.update import ENDED, JOB_DELETED, Job, Private, Update
from server.brokers.redis_client import Script

SCHEMA: Final = 1
SHARDS: Final = 16
# Notifications have a shard of their own, which every node follows.
NOTICES_SHARD: Final = SHARDS
KEY_MS: Final = 600_000  # promised are five minutes; the rest covers slow retries
LASTING_KEY_MS: Final = (
    86_400_000  # for what a spool passes on: its server may be killed, and be away for long, half-way
)

PREFIX: Final = "{statuswire}:"
CALLBACKS: Final = f"{PREFIX}callbacks".encode()  # the node whose turn it is to tell
META: Final = f"{PREFIX}meta".encode()
WHERE: Final = f"{PREFIX}where".encode()
LEASES: Final = f"{PREFIX}leases".encode()
PROBE: Final = f"{PREFIX}probe".encode()
IMPORTING: Final = f"{PREFIX}importing".encode()
ENDED_JOBS: Final = f"{PREFIX}ended".encode()
JOBS: Final = tuple(f"{PREFIX}jobs:{shard}".encode() for shard in range(SHARDS + 1))
LOGS: Final = tuple(f"{PREFIX}log:{shard}".encode() for shard in range(SHARDS + 1))
CHANNELS: Final = tuple(f"{PREFIX}shard:{shard}".encode() for shard in range(SHARDS + 1))
SHARD_OF_CHANNEL: Final = {channel: shard for shard, channel in enumerate(CHANNELS)}
PUBLISH_KEYS: Final = tuple(
    (META, JOBS[shard], LOGS[shard], WHERE, LEASES, ENDED_JOBS, CHANNELS[shard]) for shard in range(SHARDS)
)


def shard_of(user_id: str) -> int:
    """Where a user's jobs are."""
    return crc32(user_id.encode()) % SHARDS


def idempotency_key(digest: bytes) -> bytes:
    """Where the first answer under an idempotency key is."""
    return f"{PREFIX}key:{digest.hex()}".encode()


def mark_key(name: str) -> bytes:
    """Where a reader of the whole log keeps how far it has come."""
    return f"{PREFIX}mark:{name}".encode()


def cursor_key(client: str) -> bytes:
    """Where a polling client's cursor is."""
    return f"{PREFIX}cursor:{client}".encode()


# What is inside


class Write(msgspec.Struct, array_like=True, gc=False):
    """A job's state as one call wrote it, without what the call itself decides (offset, time).

    Attributes:
        job_id, user_id: of the job.
        rev: names this state.
        entry: it comes with an entry of the log; else only sums changed that nobody is shown.
        type, kind, status, version, body, urgent: see ``Update``.
        private: see ``Job``; None for a job that was deleted.
    """

    job_id: str
    user_id: str
    rev: str
    entry: bool
    type: str
    kind: str | None
    status: str
    version: int
    urgent: bool
    body: bytes
    private: Private | None


class NoticeWrite(Write):
    """A write as it is read: with what only notifications have.

    Attributes:
        targets: see ``Update``.
        store: it is kept for its users.
    """

    targets: tuple[str, ...] | None = None
    store: bool = False


class Message(msgspec.Struct, array_like=True, gc=False):
    """One call's outcome: in the stream, and to whoever listens.

    Attributes:
        epoch: the log's.
        prev: the stamp of the shard's message before this one, 0 for the first.
        first: offset of the first entry.
        stamp: offset of the last entry; names the message.
        at_ms: when, unix milliseconds.
        created: of each write, the offset of the job's first entry.
        gone: jobs that made room for others, without an entry; among notifications, stored ones that are let go of, as
            ``<user>/<offset>``.
        writes: what was written, in log order; those with an entry have ``first``, ``first + 1``, …
    """

    epoch: str
    prev: int
    first: int
    stamp: int
    at_ms: int
    created: list[int]
    gone: list[str]
    writes: list[NoticeWrite]


encode_write: Final = msgspec.msgpack.Encoder().encode
encode_message: Final = msgspec.msgpack.Encoder().encode
decode_message: Final = msgspec.msgpack.Decoder(Message).decode
decode_write: Final = msgspec.msgpack.Decoder(NoticeWrite).decode


class Stored(msgspec.Struct, gc=False):
    """A job as Redis has it: ``job`` is None if there is none, then ``rev`` is "" and ``shard`` -1."""

    rev: str
    stamp: int
    shard: int
    job: Job | None


def write_of(job: Job | None, update: Update, rev: str, *, entry: bool) -> bytes:
    """A state for the publish script."""
    return encode_write(
        Write(
            update.job_id,
            update.user_id,
            rev,
            entry,
            update.type,
            update.kind,
            update.status,
            update.version,
            update.urgent,
            update.body,
            None if job is None else job.private,
        )
    )


def update_of(write: Write, offset: int, at_ms: int) -> Update:
    """The entry that came with a write."""
    if isinstance(write, NoticeWrite) and write.targets is not None:
        return notice_entry(offset, at_ms, write.kind or "", write.targets, write.body)
    return Update(
        offset,
        at_ms,
        write.type,
        write.job_id,
        write.user_id,
        write.kind,
        write.status,
        write.version,
        write.body,
        write.type == JOB_DELETED or write.status in ENDED,
        write.urgent,
    )


def stored_of(blob: bytes | None, stamp: int) -> Stored:
    """What a value of ``jobs:<k>`` says, None as of ``stamp`` meaning that there is no such job."""
    if blob is None:
        return Stored("", stamp, -1, None)
    head, _, rest = blob.partition(b"\n")
    rev, created, offset, at_ms, written = head.split(b" ")
    write = decode_write(rest)
    assert write.private is not None
    job = Job(update_of(write, int(offset), int(at_ms)), int(created), write.private)
    return Stored(rev.decode(), int(written), shard_of(write.user_id), job)


# Scripts. Each answers with an array whose first element says how to read the rest.

DONE: Final = 0
OTHER_EPOCH: Final = 1
REPEATED: Final = 2
CONFLICT: Final = 3
FULL: Final = 4

Kind = Literal["s", "q", "d"]
"""What is done with a job: "s" sets it with an entry, "q" quietly without one, "d" deletes it, with an entry."""

# One call of this is one accepted update: 8 keys at most, about 25 µs of Redis' time.
# KEYS: PUBLISH_KEYS of the shard, and the idempotency key if there is one.
# ARGV: epoch, at_ms, max_updates, max_jobs, PUBLISH or SPUBLISH, shard, fingerprint (with a + behind it for a key that
#   lasts); then for every write:
#   job id, expected rev ("" for none), new rev, kind, lease, ended, version, Write.
# lease: milliseconds from now, "0" for none any more, "" to leave it. ended: "1", "0" or "" likewise.
# Answers: DONE first at_ms created…; OTHER_EPOCH epoch; REPEATED value offset state; CONFLICT offset state…; FULL.
PUBLISH: Final = Script(
    """
local call, sub, match = redis.call, string.sub, string.match
local meta, where, shard, prefix = KEYS[1], KEYS[4], ARGV[6], sub(KEYS[1], 1, -5)
local state = call('HMGET', meta, 'epoch', 'offset', 'at', 'last:' .. shard)
if state[1] ~= ARGV[1] then return {1, state[1]} end
if KEYS[8] then
  local value = call('GET', KEYS[8])
  if value then
    local id = match(value, ' (%S+) ')
    local at = call('HGET', where, id)
    return {2, value, tonumber(state[2]), at and call('HGET', prefix .. 'jobs:' .. at, id)}
  end
end
local blobs, entries, creates, fits = {}, 0, false, true
for i = 8, #ARGV, 8 do
  local id, expected = ARGV[i], ARGV[i + 1]
  if expected == '' then
    if call('HEXISTS', where, id) == 1 then fits = false break end
    creates = true
  else
    local blob = call('HGET', KEYS[2], id)
    if not blob or sub(blob, 1, #expected + 1) ~= expected .. ' ' then fits = false break end
    blobs[i] = blob
  end
  if ARGV[i + 3] ~= 'q' then entries = entries + 1 end
end
local offset, last = tonumber(state[2]), tonumber(state[4] or 0)
if not fits then
  local answer = {3, offset}
  for i = 8, #ARGV, 8 do
    local at = call('HGET', where, ARGV[i])
    answer[#answer + 1] = at and call('HGET', prefix .. 'jobs:' .. at, ARGV[i])
  end
  return answer
end
local at, bound = math.max(tonumber(state[3]), tonumber(ARGV[2])), tonumber(ARGV[3])
local pack = cmsgpack.pack
local function tell(log, channel, message, stamp)
  call('XADD', log, 'MINID', '~', math.max(0, stamp - bound), stamp .. '-0', 'm', message)
  call(ARGV[5], channel, message)
end
local victim, its, prev
if creates and call('HLEN', where) >= tonumber(ARGV[4]) then
  local mine = {}
  for i = 8, #ARGV, 8 do mine[ARGV[i]] = true end
  for _, id in ipairs(call('ZRANGE', KEYS[6], 0, 15)) do
    if not mine[id] then victim = id break end
  end
  if not victim then return {4} end
  its = call('HGET', where, victim)
  prev = its == shard and last or tonumber(call('HGET', meta, 'last:' .. its) or 0)
  offset = offset + 1
end
-- The first write is one that a full Redis refuses: then nothing has been written.
local stamp, entry, now = offset + entries, offset, nil
call('HSET', meta, 'offset', stamp, 'at', at, 'last:' .. shard, stamp)
if victim then
  call('HDEL', prefix .. 'jobs:' .. its, victim)
  call('HDEL', where, victim)
  call('ZREM', KEYS[6], victim)
  tell(prefix .. 'log:' .. its, prefix .. 'shard:' .. its, '\\152' .. pack(ARGV[1], prev, offset, offset, at)
    .. '\\144\\145' .. pack(victim) .. '\\144', offset)
  if its == shard then last = offset else call('HSET', meta, 'last:' .. its, offset) end
end
local answer, created, texts = {0, offset + 1, at}, {}, {}
for i = 8, #ARGV, 8 do
  local id, kind, lease, ended = ARGV[i], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]
  local born, shown, then_ = entry + 1, entry + 1, at
  if blobs[i] then
    born, shown, then_ = match(blobs[i], '^%S+ (%d+) (%d+) (%d+)')
    born = tonumber(born)
  end
  if kind ~= 'q' then
    entry = entry + 1
    shown, then_ = entry, at
  end
  if kind == 'd' then
    call('HDEL', KEYS[2], id)
    call('HDEL', where, id)
  else
    if not blobs[i] then call('HSET', where, id, shard) end
    call('HSET', KEYS[2], id, table.concat({ARGV[i + 2], born, shown, then_, stamp}, ' ') .. '\\n' .. ARGV[i + 7])
  end
  if lease == '0' then
    call('ZREM', KEYS[5], id)
  elseif lease ~= '' then
    if not now then
      local time = call('TIME')
      now = time[1] * 1000 + math.floor(time[2] / 1000)
    end
    call('ZADD', KEYS[5], now + tonumber(lease), id)
  end
  if ended == '0' then
    call('ZREM', KEYS[6], id)
  elseif ended == '1' then
    call('ZADD', KEYS[6], entry, id)
  end
  created[#created + 1] = born
  answer[#answer + 1] = born
  texts[#texts + 1] = ARGV[i + 7]
end
if KEYS[8] then
  local print, keep = sub(ARGV[7], 1, 32), KEY_MS
  if #ARGV[7] > 32 then keep = LASTING end
  call('SET', KEYS[8], print .. ' ' .. ARGV[8] .. ' ' .. (offset + 1) .. ' ' .. ARGV[14], 'PX', keep)
end
tell(KEYS[3], KEYS[7], '\\152' .. pack(ARGV[1], last, offset + 1, stamp, at, created) .. '\\144'
  .. string.char(144 + #texts) .. table.concat(texts), stamp)
return answer
""".replace("KEY_MS", str(KEY_MS)).replace("LASTING", str(LASTING_KEY_MS))
)

# KEYS: meta, where, and an idempotency key if there is one. ARGV: job ids.
# Answers: epoch, offset, the key's value, and the state of every job; if there is a value, of the job that it names.
LOOK: Final = Script("""
local state = redis.call('HMGET', KEYS[1], 'epoch', 'offset')
local answer = {state[1], tonumber(state[2] or 0), KEYS[3] and redis.call('GET', KEYS[3]) or false}
local prefix = string.sub(KEYS[1], 1, -5)
local ids = answer[3] and {string.match(answer[3], ' (%S+) ')} or ARGV
for _, id in ipairs(ids) do
  local shard = redis.call('HGET', KEYS[2], id)
  answer[#answer + 1] = shard and redis.call('HGET', prefix .. 'jobs:' .. shard, id)
end
return answer
""")

# A key for something that is no job's. KEYS: meta and the key. ARGV: fingerprint. Answers: offset, the value before.
CLAIM: Final = Script(
    """
local offset, value = tonumber(redis.call('HGET', KEYS[1], 'offset') or 0), redis.call('GET', KEYS[2])
if not value then redis.call('SET', KEYS[2], ARGV[1] .. ' / ' .. offset .. ' 0', 'PX', KEY_MS) end
return {offset, value}
""".replace("KEY_MS", str(KEY_MS))
)

# Everything in some shards, at one moment. KEYS: meta, then their jobs. ARGV: the shards.
# Answers: epoch, offset, at, and for every shard all values.
LOAD: Final = Script("""
local state = redis.call('HMGET', KEYS[1], 'epoch', 'offset', 'at')
local answer = {state[1], tonumber(state[2] or 0), tonumber(state[3] or 0)}
for i = 2, #KEYS do answer[#answer + 1] = redis.call('HVALS', KEYS[i]) end
return answer
""")

# What came after, at one moment. KEYS: meta, then logs. ARGV: how many at most, then the stamp of each log.
# Answers: epoch, offset, and for every log its cut and its entries from that stamp on, including it.
AFTER: Final = Script("""
local state = redis.call('HMGET', KEYS[1], 'epoch', 'offset')
local answer = {state[1], tonumber(state[2] or 0)}
for i = 2, #KEYS do
  answer[#answer + 1] = tonumber(redis.call('HGET', KEYS[1], 'cut:' .. string.match(KEYS[i], '%d+$')) or 0)
  answer[#answer + 1] = redis.call('XRANGE', KEYS[i], ARGV[i] .. '-0', '+', 'COUNT', ARGV[1])
end
return answer
""")

# Once a second. KEYS: meta, where, leases. ARGV: how many jobs at most, seconds that entries are kept, SHARDS, how many
# jobs to pass over.
# Takes entries out of the logs that are too old, but of each log leaves the newest: who has read it knows by it that
# nothing is missing. About 50 µs where there are none.
# Answers: meta, milliseconds until the next lease runs out (-1 without one), and the states of jobs whose lease has.
TICK: Final = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local prefix = string.sub(KEYS[1], 1, -5)
local since = now - ARGV[2] * 1000
local function from(log, id)
  local entry = redis.call('XRANGE', log, id, '+', 'COUNT', 1)[1]
  if not entry then return end
  local heads = {cmsgpack.unpack_limit(entry[2][2], 5, 1)}
  return tonumber(string.match(entry[1], '^%d+')), heads[#heads]
end
for shard = 0, ARGV[3] - 1 do
  local log = prefix .. 'log:' .. shard
  local stamp, at = from(log, '-')
  if stamp and at < since then
    local low, high = stamp, tonumber(redis.call('HGET', KEYS[1], 'last:' .. shard) or 0)
    while low < high do
      local middle = math.floor((low + high) / 2)
      stamp, at = from(log, middle .. '-0')
      if stamp and stamp < high and at < since then low = stamp + 1 else high = middle end
    end
    -- A full Redis refuses the one and not the other.
    local noted = redis.pcall('HSET', KEYS[1], 'cut:' .. shard, low - 1)
    if type(noted) == 'number' then redis.call('XTRIM', log, 'MINID', low .. '-0') end
  end
end
local answer = {redis.call('HGETALL', KEYS[1]), -1}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', ARGV[4], ARGV[1])) do
  local shard = redis.call('HGET', KEYS[2], id)
  local blob = shard and redis.call('HGET', prefix .. 'jobs:' .. shard, id)
  if blob then answer[#answer + 1] = blob else redis.call('ZREM', KEYS[3], id) end
end
local next = redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
if next[2] then answer[2] = next[2] - now end
return answer
""")

# KEYS: meta. ARGV: an epoch, in case there is none; SCHEMA; SHARDS.
# Answers: epoch, offset, at, schema, shards; no epoch while something is being imported.
BEGIN: Final = Script("""
if redis.call('HEXISTS', KEYS[1], 'importing') == 1 then return {false, '0', '0', ARGV[2], ARGV[3]} end
if redis.call('HEXISTS', KEYS[1], 'epoch') == 0 then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'offset', 0, 'at', 0, 'schema', ARGV[2], 'shards', ARGV[3])
end
return redis.call('HMGET', KEYS[1], 'epoch', 'offset', 'at', 'schema', 'shards')
""")

# KEYS: meta. ARGV: the epoch that is over, the one to follow. Answers: the epoch from now on.
RENEW: Final = Script("""
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then redis.call('HSET', KEYS[1], 'epoch', ARGV[2]) end
return redis.call('HGET', KEYS[1], 'epoch')
""")
