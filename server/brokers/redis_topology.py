"""Which node to ask: the sentinels' master, the hash slot of a key, the map of a cluster."""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import trio

from protocol.resp import Argument, ProtocolError, RedisError, Value
from server.brokers.redis_connection import connect, exchange
from server.brokers.redis_errors import CrossSlotError, RedisStartError
from server.brokers.redis_url import Address, Options, RedisUrl

SLOTS: Final = 16384

# Commands whose keys are not just their first argument; what is missing here has one key, directly after its name.
# fmt: off
_NO_KEY: Final = frozenset({
    "ACL", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "DBSIZE", "DEBUG", "ECHO", "FLUSHALL", "FLUSHDB", "FUNCTION",
    "INFO", "KEYS", "LATENCY", "PING", "PUBLISH", "PUBSUB", "ROLE", "SCAN", "SCRIPT", "SLOWLOG", "TIME", "WAIT",
})
_ALL_KEYS: Final = frozenset({"DEL", "EXISTS", "MGET", "RENAME", "TOUCH", "UNLINK", "SDIFF", "SINTER", "SUNION"})
# fmt: on
_NUMBER_OF_KEYS: Final = frozenset(["EVAL", "EVALSHA", "EVAL_RO", "EVALSHA_RO", "FCALL", "FCALL_RO"])
_SECOND: Final = frozenset(["BITOP", "MEMORY", "OBJECT", "XGROUP", "XINFO"])


def hash_slot(key: bytes | str) -> int:
    """CRC16 (XMODEM) of the key, or of what stands in its first ``{…}`` if that is not empty, modulo 16384.

    See "Redis cluster specification", "Key distribution model" and "Hash tags". 0.3 µs.
    """
    if key.__class__ is str:
        key = key.encode()
    assert isinstance(key, bytes)
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % SLOTS


def keys_of(command: Sequence[Argument]) -> Sequence[Argument]:
    """The keys that a command names; of a command unknown here its first argument."""
    name = str(command[0]).upper() if isinstance(command[0], str) else bytes(command[0]).decode().upper()  # type: ignore[arg-type]
    if name in _NO_KEY:
        return ()
    if name in _ALL_KEYS:
        return command[1:]
    if name in _NUMBER_OF_KEYS:
        return command[3 : 3 + int(command[2])]
    if name in _SECOND:
        return command[2:3]
    if name in ("XREAD", "XREADGROUP"):
        words = [word.upper() if isinstance(word, str | bytes) else word for word in command]
        streams = words.index("STREAMS" if "STREAMS" in words else b"STREAMS") + 1
        return command[streams : streams + (len(command) - streams) // 2]
    return command[1:2]


def slot_of(keys: Iterable[Argument]) -> int:
    """The one slot of all of these keys; -1 if there are none.

    Raises:
        CrossSlotError: there are several slots.
    """
    slot = -1
    first: Argument = b""
    for key in keys:
        its = hash_slot(key if isinstance(key, bytes | str) else str(key))
        if slot < 0:
            slot, first = its, key
        elif its != slot:
            raise CrossSlotError(f"{first!r} and {key!r} are in different hash slots; give their names one {{tag}}")
    return slot


def group_by_slot(channels: Iterable[bytes]) -> list[list[bytes]]:
    """Channels that one SSUBSCRIBE may name together."""
    groups: dict[int, list[bytes]] = {}
    for channel in channels:
        groups.setdefault(hash_slot(channel), []).append(channel)
    return list(groups.values())


class Range(NamedTuple):
    """Slots ``start`` to ``end``, both included, their master, and its replicas."""

    start: int
    end: int
    master: Address
    replicas: tuple[Address, ...]


def parse_slots(value: Value, asked: Address) -> list[Range]:
    """The answer to CLUSTER SLOTS. A node that does not know its own host leaves it empty: then it is the one asked."""
    ranges = []
    for start, end, *nodes in value:
        addresses = []
        for host, port, *_ in nodes:
            name = host.decode() if host else ""
            addresses.append(Address(asked.host if name in ("", "?") else name, port))
        if addresses:
            ranges.append(Range(start, end, addresses[0], tuple(addresses[1:])))
    return ranges


async def fetch_slots(address: Address, url: RedisUrl, options: Options) -> list[Range]:
    """Ask one node of a cluster, over a connection of its own.

    Raises:
        RedisStartError: it does not say.
    """
    stream, _ = await connect(address, url, options)
    try:
        with trio.fail_after(options.connect_timeout_s):
            (value,) = await exchange(stream, [("CLUSTER", "SLOTS")])
    except (trio.TooSlowError, trio.BrokenResourceError, ProtocolError, OSError, EOFError) as error:
        raise RedisStartError(f"Redis at {address} broke off ({error!r}).", passing=True) from error
    finally:
        await trio.aclose_forcefully(stream)
    if isinstance(value, RedisError):
        raise RedisStartError(f"Redis at {address} refuses CLUSTER SLOTS: {value}.")
    return parse_slots(value, address)


async def find_master(url: RedisUrl, options: Options, sentinels: Sequence[Address]) -> tuple[Address, Address]:
    """Ask the sentinels, in this order, for the master.

    See "Guidelines for Redis clients with support for Redis Sentinel"; that it is one indeed is checked by ``connect``.

    Returns:
        The master, and the sentinel that said so.

    Raises:
        RedisStartError: none of them can say.
    """
    # All of them together may take as long as one connection: a dead one must not hold up a failover.
    patience = options.connect_timeout_s / len(sentinels)
    problems: list[RedisStartError] = []
    for sentinel in sentinels:
        try:
            with trio.fail_after(patience):
                stream, _ = await connect(sentinel, url, options, "sentinel")
                try:
                    (value,) = await exchange(stream, [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.master_name)])
                finally:
                    await trio.aclose_forcefully(stream)
        except RedisStartError as error:
            problems.append(error)
        except (trio.TooSlowError, trio.BrokenResourceError, ProtocolError, OSError, EOFError) as error:
            problems.append(RedisStartError(f"The sentinel at {sentinel} does not answer ({error!r}).", passing=True))
        else:
            if isinstance(value, list):
                return Address(value[0].decode(), int(value[1])), sentinel
            detail = f" ({value})" if isinstance(value, RedisError) else ""
            problems.append(RedisStartError(f"The sentinel at {sentinel} knows no master {url.master_name!r}{detail}."))
    # What does not pass is what somebody has to mend: say that.
    for problem in problems:
        if not problem.passing:
            raise problem
    raise RedisStartError(f"No sentinel can be asked. {problems[0]}", passing=True) from problems[0]
