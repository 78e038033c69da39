"""How much one user or one address may do: connections at a time, and connects, messages, publishes per second.

A limit of 0 is no limit and keeps no table. Every table is bounded, and holds nothing about those who are gone or
have been quiet long enough to be as good as new. What is too much is refused with 429 (RFC 6585 section 4) and says
when to come back.

What a user may do holds over all nodes that share a store (``Limits.common``); what an address may do, and the number
of sockets, is each process' own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from math import ceil
from typing import TYPE_CHECKING, Protocol

import trio

from protocol.errors import ApiError
from protocol.ratelimit import Share, TokenBucket
from server import config
from server.config import ConfigError

if TYPE_CHECKING:
    from protocol.request import Request

# Buckets of one table, about 300 bytes each. When it is full the one longest unused is forgotten, so an attacker with
# this many addresses gets fresh buckets, but no memory.
MAX_BUCKETS = 65_536
# Events of one user's comings and goings that others are told, at once and then per second. Each is an entry of the
# log, and it takes no capability to make them: whoever joined and left channels in a loop could push everybody's
# updates out of it. A connection that comes with all the channels it may have, and comes again, stays within.
EVENTS_AT_ONCE = 2000
EVENTS_PER_SECOND = 20.0
# What each connection may hold without a share of ``limits.unfinished``: ordinary ones are not refused because somebody
# sends, or asks for, many large ones.
UNFINISHED_FREE = 65_536  # bytes
# When a user's connection will end is unknown; soon enough to be no nuisance, late enough to be no load.
CONNECTION_RETRY = 5  # seconds
# More proxies in a row than anyone has; a forwarded list longer than this comes from somebody who wants us to work.
MAX_HOPS = 32
UNIX = "unix"  # the peer of a connection over a Unix socket, and its name in the list of trusted proxies


class Common(Protocol):
    """Token buckets that several nodes have in common."""

    async def take_tokens(self, what: str, user: str, rate: float, n: int) -> tuple[float, float] | None:
        """Take ``n`` tokens of a user's, or some more while there are many.

        Returns:
            How many were taken, and if none were the seconds until there are enough; None if they cannot be asked.
        """


class Limits:
    """The limits of one server. Times are monotonic seconds, of one clock.

    Attributes:
        common: the rates per user over all nodes, if there can be several.
        unfinished: bytes of what ``hold`` is told, without those that are free.
    """

    def __init__(self, limits: config.Limits) -> None:
        self.common: Common | None = None
        self.unfinished = 0
        self._open: dict[str, int] = {}
        self.reload(limits)

    def reload(self, limits: config.Limits) -> None:
        """Take new limits; rates start anew."""
        self.connections_per_user = limits.connections_per_user
        self.connections_per_address = limits.connections_per_address
        self.max_unfinished = limits.unfinished
        # Whether there is anything to ask of ``check_connect``, ``check_message``, ``check_publish``.
        self.on_connects = limits.connects_per_second > 0
        self.on_messages = limits.messages_per_second > 0
        self.on_publishes = limits.publishes_per_second > 0
        self._connects = Rates(limits.connects_per_second, "connections from your address")
        self._messages = Rates(limits.messages_per_second, "messages")
        self._publishes = Rates(limits.publishes_per_second, "updates")
        self._events = Rates(EVENTS_PER_SECOND, "presence events", burst=EVENTS_AT_ONCE)
        self._shares: OrderedDict[tuple[str, str], Share] = OrderedDict()  # the longest unused first

    def check_connections(self, held: int) -> None:
        """See that a user with ``held`` live connections may have one more.

        Raises:
            ApiError: 429 ``rate_limited``: these are ``connections_per_user`` already.
        """
        if 0 < self.connections_per_user <= held:
            raise _too_much(f"you have {held} connections open, which is the limit; close one first", CONNECTION_RETRY)

    def check_connect(self, address: str, now: float) -> None:
        """Take one of the connects an address may make; ``address`` as ``client_address`` gives it.

        Raises:
            ApiError: 429 ``rate_limited``.
        """
        if self._connects.rate:
            self._connects.take(_network_of(address), now, 1)

    def enter(self, address: str) -> str:
        """Take a place for one more open connection of an address.

        Returns:
            The place, for ``leave``; "" if they are not counted.

        Raises:
            ApiError: 429 ``rate_limited``: these are ``connections_per_address`` already.
        """
        limit = self.connections_per_address
        if not limit:
            return ""
        place = _network_of(address)
        held = self._open.get(place, 0)
        if held >= limit:
            message = f"there are {held} connections open from your address, which is the limit; close one first"
            raise _too_much(message, CONNECTION_RETRY)
        self._open[place] = held + 1
        return place

    def leave(self, place: str) -> None:
        """Give a place back."""
        left = self._open.get(place, 0) - 1
        if left > 0:
            self._open[place] = left
        else:
            self._open.pop(place, None)

    def hold(self, before: int, now: int) -> None:
        """What one connection takes for a request or message under way has become more or less: of a body that is not
        whole yet, of jobs that are looked through for an answer.

        Args:
            before: bytes until now, 0 at the beginning.
            now: bytes from now on, 0 at the end.

        Raises:
            ApiError: 503 ``try_later``: all connections together have ``unfinished`` already; nothing has changed.
        """
        change = max(0, now - UNFINISHED_FREE) - max(0, before - UNFINISHED_FREE)
        if change > 0 and self.unfinished + change > self.max_unfinished:
            raise ApiError(503, "try_later", "the server has as much in hand as it can; try again", retry_after=1)
        self.unfinished += change

    async def check_message(self, user: str, now: float) -> None:
        """Take one of a user's WebSocket messages.

        Raises:
            ApiError: 429 ``rate_limited``.
        """
        if self._messages.rate:
            await self._take(self._messages, user, now, 1)

    async def check_publish(self, user: str, now: float, n: int = 1) -> None:
        """Take ``n`` of a user's updates: all or none. A batch larger than the rate passes alone, then it is paid off.

        Raises:
            ApiError: 429 ``rate_limited``.
        """
        if self._publishes.rate:
            await self._take(self._publishes, user, now, n)

    def may_tell(self, user: str, now: float) -> bool:
        """Take one of the presence events that a user may cause; whether there was one."""
        return self._events.wait(user, now, 1) <= 0.0

    async def _take(self, rates: Rates, user: str, now: float, n: int) -> None:
        """From what this node has of the common bucket, from that itself, or, where nobody can ask it, from our own."""
        if self.common is None:
            rates.take(user, now, n)
            return
        shares, key = self._shares, (rates.what, user)
        share = shares.get(key)
        if share is None:
            if len(shares) >= MAX_BUCKETS:
                shares.popitem(last=False)
            share = shares[key] = Share()
        else:
            shares.move_to_end(key)
        wait = share.take(now, n)
        if wait is None:
            answer = await self.common.take_tokens(rates.what, user, rates.rate, n)
            if answer is None:
                rates.take(user, now, n)
                return
            taken, wait = answer
            if taken:
                share.put(trio.current_time(), taken - n)
            else:
                share.refuse(trio.current_time(), wait)
        if wait > 0.0:
            raise rates.too_many(wait)

    def sweep(self, now: float) -> None:
        """Forget all who have been quiet long enough. For a server without traffic; taking does the same in passing."""
        for rates in (self._connects, self._messages, self._publishes, self._events):
            rates.sweep(now)
        for key in [key for key, share in self._shares.items() if share.idle(now)]:
            del self._shares[key]

    @property
    def entries(self) -> int:
        """How many table entries there are, over all tables."""
        rates = (self._connects, self._messages, self._publishes, self._events)
        return sum(len(each) for each in rates) + len(self._shares) + len(self._open)


class Rates:
    """A token bucket per key. A rate of 0 is no limit: do not take then."""

    __slots__ = ("_buckets", "burst", "rate", "what")

    def __init__(self, rate: float, what: str, *, burst: float = 1.0) -> None:
        """``rate`` per second, and ``burst`` at once, a second's worth at least; ``what`` is counted, in words for
        the refusal."""
        self.rate = rate
        self.burst = max(rate, burst)
        self.what = what
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, now: float, n: int) -> None:
        """Take ``n`` tokens of ``key``.

        Raises:
            ApiError: 429 ``rate_limited``; nothing was taken.
        """
        wait = self.wait(key, now, n)
        if wait > 0.0:
            raise self.too_many(wait)

    def wait(self, key: str, now: float, n: int) -> float:
        """Take ``n`` tokens of ``key``: 0.0; or take nothing: the seconds until they are there."""
        buckets = self._buckets
        bucket = buckets.get(key)
        if bucket is None:
            self.sweep(now)
            if len(buckets) >= MAX_BUCKETS:
                buckets.popitem(last=False)
            bucket = buckets[key] = TokenBucket(self.rate, self.burst)
        else:
            buckets.move_to_end(key)
        return bucket.take(now, n)

    def too_many(self, wait: float) -> ApiError:
        """The refusal, for so many seconds."""
        return _too_much(f"too many {self.what}: at most {self.rate:g} per second", max(1, ceil(wait)))

    def sweep(self, now: float) -> None:
        """Forget full buckets, the longest unused first, up to the first that is not full.

        A large batch can leave a bucket in debt and so hold up those behind it, but only until it is paid.
        """
        buckets = self._buckets
        while buckets:
            key, bucket = next(iter(buckets.items()))
            if not bucket.full(now):
                return
            del buckets[key]


def _too_much(message: str, retry_after: int) -> ApiError:
    return ApiError(429, "rate_limited", message, retry_after=retry_after)


def _network_of(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 one, which a single host is given whole."""
    if ":" not in address:
        return address
    parsed = _parse_address(address)
    if not isinstance(parsed, IPv6Address):
        return address
    return str(IPv6Address(int(parsed) >> 64 << 64))


# --- where a request came from ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """Whose ``X-Forwarded-For`` is believed."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    unix: bool = False

    def trusts(self, peer: str) -> bool:
        """Whether a peer, as ``client_address`` takes it, is one of ours."""
        if peer in ("", UNIX):
            return self.unix
        if not self.networks:
            return False
        address = _parse_address(peer)
        return address is not None and self._contains(address)

    def _contains(self, address: IPv4Address | IPv6Address) -> bool:
        return bool(self.networks) and any(address in network for network in self.networks)


def parse_proxies(entries: Sequence[str]) -> TrustedProxies:
    """Addresses, networks such as ``10.0.0.0/8``, and ``unix`` for whoever connects over the Unix socket.

    Raises:
        ConfigError: an entry that is none of these.
    """
    networks = []
    for entry in entries:
        if entry == UNIX:
            continue
        try:
            networks.append(ip_network(entry, strict=False))
        except ValueError as error:
            raise ConfigError(
                f"server.trusted_proxies: {entry!r} is neither an address, nor a network such as 10.0.0.0/8, nor {UNIX}"
            ) from error
    return TrustedProxies(tuple(networks), UNIX in entries)


def client_address(peer: str, request: Request, trusted: TrustedProxies) -> str:
    """The address a request came from: the last hop before our own proxies.

    Each proxy appends the address it was called from to ``X-Forwarded-For``, so only what our own proxies wrote, the
    right end, is to be believed. What is not an address ends the search at the hop that reported it.

    Args:
        peer: IP address at the other end of the socket, without port; ``unix`` (or empty) for a Unix socket.

    Returns:
        An IP address in its usual form, IPv4 where it is IPv4 mapped into IPv6; ``unix`` if nothing more is known.
    """
    if not trusted.networks and peer not in ("", UNIX):
        return _usual(peer)
    if peer in ("", UNIX):
        client, believed = UNIX, trusted.unix
    else:
        address = _parse_address(peer)
        if address is None:
            return peer
        client, believed = _written(address), trusted._contains(address)
    forwarded = request.headers.get("x-forwarded-for")
    if not believed or forwarded is None:
        return client
    for hop in reversed(forwarded.rsplit(",", MAX_HOPS)[-MAX_HOPS:]):
        address = _parse_hop(hop.strip())
        if address is None:
            break
        client = str(address)
        if not trusted._contains(address):
            break
    return client


def _parse_hop(text: str) -> IPv4Address | IPv6Address | None:
    """An address as proxies write it: bare, or with a port (``1.2.3.4:80``, ``[::1]:80``)."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return _parse_address(text)


@lru_cache(maxsize=4096)
def _usual(text: str) -> str:
    """An address in its usual form; what is none as it is."""
    address = _parse_address(text)
    return text if address is None else str(address)


@lru_cache(maxsize=4096)
def _written(address: IPv4Address | IPv6Address) -> str:
    return str(address)


@lru_cache(maxsize=4096)  # a connection has one address for all its requests
def _parse_address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text.partition("%")[0])  # without the interface of a link-local address
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
