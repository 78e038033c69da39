"""Exporting from and importing to Redis; for what is where see ``redis_keys``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO, Final

from protocol.resp import RedisError
from protocol.update import JOB_DELETED, Job, Private, Update
from server.brokers.redis_client import (
    Client,
    RedisClientError,
    RedisStartError,
    Reply,
    Script,
    open_client,
    parse_redis_url,
)
from server.brokers.redis_keys import (
    ENDED_JOBS,
    IMPORTING,
    JOBS,
    LEASES,
    LOGS,
    META,
    NOTICES_SHARD,
    SCHEMA,
    SHARDS,
    WHERE,
    Message,
    NoticeWrite,
    decode_message,
    encode_message,
    encode_write,
    mark_key,
    shard_of,
    stored_of,
)
from server.brokers.redis_notices import STORED, load_stored, store_commands, write_of_notice
from server.brokers.redis_reading import cut_of, entries_of
from server.config import Config
from server.transfer.lines import Header, Item, Mark, Reader, Stored, TransferError, Writer

# Jobs or messages read at once, and lines sent before their answers are awaited.
_AT_ONCE: Final = 500
_SCAN: Final = 1000
# An import that is silent for so long is over.
_ALIVE_MS: Final = 30_000

# KEYS: meta, where, importing, then all that an import fills. ARGV: its name, milliseconds.
# Answers: the log's offset if there is something in it, -1 if another import is under way, nothing if it may begin.
_BEGIN: Final = Script("""
local offset = tonumber(redis.call('HGET', KEYS[1], 'offset') or 0)
if offset > 0 then return offset end
if not redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2], 'NX') then return -1 end
redis.call('DEL', KEYS[1])
for i = 4, #KEYS do redis.call('UNLINK', KEYS[i]) end
redis.call('HSET', KEYS[1], 'importing', ARGV[1])
""")

# KEYS: meta, importing, then all that an import fills. ARGV: its name, then the fields of meta; none gives it up.
# Answers: 1, or 0 if it is another's turn by now.
_FINISH: Final = Script("""
if redis.call('HGET', KEYS[1], 'importing') ~= ARGV[1] then return 0 end
if #ARGV > 1 then
  redis.call('HSET', KEYS[1], unpack(ARGV, 2))
  redis.call('HDEL', KEYS[1], 'importing')
else
  for i = 3, #KEYS do redis.call('UNLINK', KEYS[i]) end
  redis.call('DEL', KEYS[1])
end
redis.call('DEL', KEYS[2])
return 1
""")

_FILLED: Final = (WHERE, LEASES, ENDED_JOBS, STORED, *JOBS, *LOGS)


@asynccontextmanager
async def _connected(config: Config) -> AsyncIterator[Client]:
    """A client. Whatever fails at Redis becomes a TransferError."""
    problem: BaseException | None = None
    url = parse_redis_url(config.store.url)
    try:
        async with open_client(url) as client:
            try:
                yield client
            except (RedisError, RedisClientError) as error:  # beyond the client's nursery it would be a group
                problem = TransferError(f"store.url: {url} failed ({error})")
            except (TransferError, OSError, KeyboardInterrupt) as error:
                problem = error
    except RedisStartError as error:
        raise TransferError(f"store.url: {error}") from None
    if problem is not None:
        raise problem


# Exporting


async def export(config: Config, out: IO[bytes]) -> Writer:
    """Write all that is in Redis, as of one moment: nothing may be published meanwhile.

    Raises:
        TransferError: there is nothing, something was published, or Redis failed.
    """
    async with _connected(config) as client:
        epoch, offset, at_ms, schema, shards = await client.call(
            "HMGET", META, "epoch", "offset", "at", "schema", "shards"
        )
        if epoch is None:
            raise TransferError(f"store.url: there is nothing of statuswire in {config.store.label} to export")
        if (int(schema), int(shards)) != (SCHEMA, SHARDS):
            raise TransferError(
                f"store.url: what is kept has format {int(schema)} with {int(shards)} shards, this version reads "
                f"format {SCHEMA} with {SHARDS}; export it with the version that wrote it"
            )
        last = int(offset)
        first = max(0, last - config.history.max_updates, await cut_of(client, range(SHARDS + 1))) + 1
        writer = Writer(out, Header(epoch=epoch.decode(), offset=last, at=int(at_ms), first=first))
        for key in JOBS[:SHARDS]:
            async for job in _jobs(client, key):
                writer.job(job)
        async for update in _updates(client, first, last):
            writer.update(update)
        for notice, users in await load_stored(client):
            writer.stored(notice, users)
        async for name, text in _marks(client):
            writer.mark(name, text)
        if await client.call("HMGET", META, "epoch", "offset") != [epoch, offset]:
            raise TransferError(
                "something was published while it was exported, so the output is of no one moment; "
                "stop the servers, or what publishes, and export again"
            )
        writer.end()
        return writer


async def _jobs(client: Client, key: bytes) -> AsyncIterator[Job]:
    """The jobs of one shard; nothing of it changes meanwhile."""
    found: set[str] = set()
    cursor = b"0"
    while True:
        cursor, flat = await client.call("HSCAN", key, cursor, "COUNT", _AT_ONCE)
        for blob in flat[1::2]:
            job = stored_of(blob, 0).job
            if job is not None and job.latest.job_id not in found:
                found.add(job.latest.job_id)
                yield job
        if cursor == b"0":
            return


async def _updates(client: Client, first: int, last: int) -> AsyncIterator[Update]:
    """The log, of all shards, by offset."""
    queues: list[list[Update]] = [[] for _ in LOGS]  # newest first
    starts: list[str | None] = [f"{first}-0"] * len(LOGS)
    while True:
        for shard, start in enumerate(starts):
            if start is not None and not queues[shard]:
                page = await client.call("XRANGE", LOGS[shard], start, f"{last}-0", "COUNT", _AT_ONCE)
                updates = [update for _, fields in page for update in entries_of(decode_message(fields[1]))]
                queues[shard] = [update for update in reversed(updates) if update.offset >= first]
                starts[shard] = "(" + page[-1][0].decode() if len(page) == _AT_ONCE else None
        waiting = [queue for queue in queues if queue]
        if not waiting and not any(starts):
            return
        # Of what is read only that can come next which is before everything that is not.
        while waiting and all(queues[shard] or start is None for shard, start in enumerate(starts)):
            queue = min(waiting, key=lambda queue: queue[-1].offset)
            yield queue.pop()
            if not queue:
                waiting.remove(queue)


async def _marks(client: Client) -> AsyncIterator[tuple[str, str]]:
    prefix = mark_key("")
    cursor = b"0"
    while True:
        reply = client.send("SCAN", cursor, "MATCH", prefix + b"*", "COUNT", _SCAN, key=META)
        cursor, keys = await reply.wait()
        for key in keys:
            yield key.removeprefix(prefix).decode(), (await client.call("GET", key)).decode()
        if cursor == b"0":
            return


# Importing


async def import_(config: Config, reader: Reader) -> None:
    """Fill a Redis that has nothing of ours in it. Servers see it only once all is there.

    Raises:
        TransferError: there is something, the input is not sound, or Redis failed; nothing of it is left if Redis lets.
    """
    async with _connected(config) as client:
        name = secrets.token_urlsafe(6)
        begun = await client.call_script(_BEGIN, [META, WHERE, IMPORTING, *_FILLED], [name, _ALIVE_MS])
        if begun == -1:
            raise TransferError(
                f"store.url: another import into {config.store.label} is under way, or broke off just now; "
                f"try again in {_ALIVE_MS // 1000} seconds"
            )
        if begun is not None:
            raise TransferError(
                f"store.url: {config.store.label} is not empty (its log stands at {begun}); name another database, or "
                "delete what begins with {statuswire}: in this one"
            )
        try:
            filling = _Filling(client, name, reader.header)
            for item in reader.items():
                filling.add(item)
                if len(filling.replies) >= _AT_ONCE:
                    await filling.wait()
            await filling.wait()
        except TransferError:
            await client.call_script(_FINISH, [META, IMPORTING, *_FILLED], [name])
            raise
        if not await client.call_script(_FINISH, [META, IMPORTING], [name, *filling.meta()]):
            raise TransferError("another import has begun meanwhile; let it finish")


class _Filling:
    """Sends what is imported, many commands at a time."""

    def __init__(self, client: Client, name: str, header: Header) -> None:
        self.replies: list[Reply] = []
        self._client = client
        self._name = name
        self._header = header
        self._count = 0
        self._last = [0] * len(LOGS)
        self._now_ms = int(time.time() * 1000)

    def add(self, item: Item) -> None:
        self._count += 1
        rev = f"{self._name}{self._count:x}"
        match item:
            case Job():
                self._job(item, rev)
            case Mark(name=name, text=text):
                self._send("SET", mark_key(name), text)
            case Update():
                self._update(item, rev)
            case Stored(notice=notice, users=users):
                for command in store_commands(notice, users, rev, self._now_ms):
                    self._send(*command)

    def _job(self, job: Job, rev: str) -> None:
        latest = job.latest
        job_id, shard = latest.job_id, shard_of(latest.user_id)
        # Its own newest entry is what it was written with, as far as anyone can tell.
        head = f"{rev} {job.created} {latest.offset} {latest.at_ms} {latest.offset}\n".encode()
        self._send("HSET", JOBS[shard], job_id, head + encode_write(_write(latest, job.private, rev)))
        self._send("HSET", WHERE, job_id, shard)
        if latest.ended:
            self._send("ZADD", ENDED_JOBS, latest.offset, job_id)
        elif job.private.ttl is not None:  # while nothing served it, no worker could report
            self._send("ZADD", LEASES, self._now_ms + round(job.private.ttl * 1000), job_id)

    def _update(self, update: Update, rev: str) -> None:
        shard, offset = shard_of(update.user_id), update.offset
        # What the server knew of the job then is not exported: nobody is shown old entries but as entries.
        write = _write(update, None if update.type == JOB_DELETED else Private(), rev)
        if update.targets is not None:
            shard, write = NOTICES_SHARD, write_of_notice(update, rev, store=False)
        message = Message(
            self._header.epoch,
            self._last[shard],
            offset,
            offset,
            update.at_ms,
            [offset],
            [],
            [write],
        )
        self._last[shard] = offset
        self._send("XADD", LOGS[shard], f"{offset}-0", "m", encode_message(message))

    def _send(self, *command: bytes | str | int | float) -> None:
        self.replies.append(self._client.send(*command))

    async def wait(self) -> None:
        """Return when all that was sent is there."""
        self._send("PEXPIRE", IMPORTING, _ALIVE_MS)
        replies, self.replies = self.replies, []
        for reply in replies:
            await reply.wait()

    def meta(self) -> list[str | int]:
        """What makes it visible."""
        header = self._header
        fields: list[str | int] = ["epoch", header.epoch, "offset", header.offset, "at", header.at]
        fields += ["schema", SCHEMA, "shards", SHARDS]
        for shard, last in enumerate(self._last):
            if last:
                fields += [f"last:{shard}", last]
            if header.first > 1:
                fields += [f"cut:{shard}", header.first - 1]
        return fields


def _write(update: Update, private: Private | None, rev: str) -> NoticeWrite:
    return NoticeWrite(
        update.job_id,
        update.user_id,
        rev,
        True,
        update.type,
        update.kind,
        update.status,
        update.version,
        update.urgent,
        update.body,
        private,
    )
