"""The client of a Redis Cluster: a pipelined connection per master, a map of slots, redirections, sharded pub/sub.

See "Redis cluster specification", "Redirection and resharding". Commands to one slot keep their order, except that
those which are redirected while a slot moves or which come up against TRYAGAIN are sent again later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final, Unpack

import trio
from trio.abc import Stream

from protocol.resp import Argument, RedisError, encode
from server.brokers.redis_connection import NodeInfo, connect
from server.brokers.redis_errors import NotConnectedError, RedisClientError, RedisStartError
from server.brokers.redis_link import CommandLink, Link, Reply, log
from server.brokers.redis_single import Callbacks, Client
from server.brokers.redis_subscriptions import SubscriptionLink
from server.brokers.redis_topology import SLOTS, Range, fetch_slots, group_by_slot, keys_of, parse_slots, slot_of
from server.brokers.redis_url import Address, Options, RedisUrl

# Seconds between looks at the map: as a rule, and while a slot has no master that answers.
_LOOK_S: Final = 30.0
_LOOK_URGENTLY_S: Final = 0.25
# Not more often, however many MOVED come.
_LOOK_AGAIN_S: Final = 0.1
# Redirections and TRYAGAIN until the error is given to the caller, as a loop would help nobody.
_TRIES: Final = 16
_TRY_AGAIN_S: Final = 0.05
# How long a redirected command waits for the connection to a node that was not known before.
_ARRIVAL_S: Final = 2.0


class ClusterClient(Client):
    """See ``Client``. Commands with keys go to the master of their slot, those without to any master."""

    sharded = True

    def __init__(self, url: RedisUrl, *, options: Options | None = None, **callbacks: Unpack[Callbacks]) -> None:
        super().__init__(url, options=options, **callbacks)
        self._owners: list[Address | None] = [None] * SLOTS
        self._known: dict[Address, None] = dict.fromkeys(url.addresses)  # every node we have heard of, replicas too
        self._links: dict[Address, CommandLink] = {}
        self._subscription_links: dict[Address, SubscriptionLink] = {}
        self._channels: set[bytes] = set()
        self._stale = trio.Event()

    # What Client asks for

    @property
    def away(self) -> str | None:
        for owner in dict.fromkeys(self._owners):
            if owner is None:
                return "no node of the cluster serves some of the slots"
            link = self._links.get(owner)
            if link is None or not link.up:
                return link.reason if link is not None else f"not connected to {owner} yet"
        return None

    @property
    def pending(self) -> int:
        return sum(link.pending for link in self._links.values())

    def send(self, *command: Argument, key: bytes | str | None = None) -> Reply:
        reply = Reply(encode(command))
        self._route(reply, keys_of(command) if key is None else (key,))
        return reply

    def _route(self, reply: Reply, keys: Sequence[Argument]) -> None:
        reply.slot = slot_of(keys)
        self._link_for(reply.slot).put(reply)

    def _link_for(self, slot: int) -> CommandLink:
        if slot < 0:
            for link in self._links.values():
                if link.up:
                    return link
            raise NotConnectedError("no node of the cluster is connected")
        owner = self._owners[slot]
        if owner is None:
            raise NotConnectedError(f"no node of the cluster serves slot {slot}")
        return self._link_to(owner)

    def subscribe(self, channels: Iterable[bytes | str]) -> None:
        new = {channel.encode() if isinstance(channel, str) else channel for channel in channels} - self._channels
        self._channels |= new
        for owner, its in self._by_owner(new).items():
            self._subscription_to(owner).want(its)

    def unsubscribe(self, channels: Iterable[bytes | str]) -> None:
        gone = {channel.encode() if isinstance(channel, str) else channel for channel in channels}
        self._channels -= gone
        self.subscribed -= gone
        for link in self._subscription_links.values():
            link.unwant(gone)

    # Links

    def _run_in(self, nursery: trio.Nursery) -> None:
        links: list[Link] = [*self._links.values(), *self._subscription_links.values()]
        for link in links:
            nursery.start_soon(link.run)
        nursery.start_soon(self._keep_map)

    async def _check(self) -> None:
        self._adopt(await self._fetch())
        for owner in {owner for owner in self._owners if owner is not None}:
            stream, _ = await self._connect_to(owner)
            await trio.aclose_forcefully(stream)
        if None in self._owners:
            raise RedisStartError(
                f"No node of the cluster {self.url} serves slot {self._owners.index(None)}: "
                "see `redis-cli --cluster check`.",
                passing=True,
            )

    async def _connect_to(self, address: Address) -> tuple[Stream, NodeInfo]:
        stream, node = await connect(address, self.url, self.options)
        if node.role != "master":
            await trio.aclose_forcefully(stream)
            self._refused()
            raise RedisStartError(f"Redis at {address} is a replica now.", passing=True)
        return stream, node

    def _link_to(self, address: Address) -> CommandLink:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = self._command_link(partial(self._connect_to, address))
            if self._nursery is not None:
                self._nursery.start_soon(link.run)
        return link

    def _subscription_to(self, address: Address) -> SubscriptionLink:
        link = self._subscription_links.get(address)
        if link is None:
            link = self._subscription_links[address] = self._subscription_link(partial(self._connect_to, address))
            if self._nursery is not None:
                self._nursery.start_soon(link.run)
        return link

    def _group(self, channels: Iterable[bytes]) -> Iterable[Sequence[bytes]]:
        return group_by_slot(channels)

    def _by_owner(self, channels: Iterable[bytes]) -> dict[Address, set[bytes]]:
        """Those whose slot is served by nobody just now are left for the next map."""
        result: dict[Address, set[bytes]] = {}
        for channel in channels:
            owner = self._owners[slot_of((channel,))]
            if owner is not None:
                result.setdefault(owner, set()).add(channel)
        return result

    def _refused(self) -> None:
        self._stale.set()

    def _went_down(self, reason: str) -> None:
        self._stale.set()
        super()._went_down(reason)

    # The map

    async def _keep_map(self) -> None:
        while True:
            with trio.move_on_after(_LOOK_S if self.away is None else _LOOK_URGENTLY_S):
                await self._stale.wait()
            self._stale = trio.Event()
            try:
                self._adopt(await self._fetch())
            except RedisStartError as error:
                log.info("The map of the cluster cannot be read: %s", error)
            await trio.sleep(_LOOK_AGAIN_S)

    async def _fetch(self) -> list[Range]:
        """The map as one node sees it: a master that we are connected to if there is one, else any that answers."""
        for address, link in list(self._links.items()):
            if link.up and address in self._owners:
                try:
                    with trio.move_on_after(self.options.connect_timeout_s / 2):
                        reply = Reply(encode(("CLUSTER", "SLOTS")))
                        link.put(reply)
                        return parse_slots(await reply.wait(), address)
                except (RedisError, RedisClientError) as error:
                    log.info("Redis at %s does not say what the cluster looks like: %s", address, error)
        problems: list[RedisStartError] = []
        for address in list(self._known):
            try:
                ranges = await fetch_slots(address, self.url, self.options)
            except RedisStartError as error:
                problems.append(error)
            else:
                if ranges:
                    return ranges
                problems.append(
                    RedisStartError(
                        f"The cluster at {address} has no slots assigned: `redis-cli --cluster create` does it."
                    )
                )
        for problem in problems:
            if not problem.passing:
                raise problem
        raise problems[0]

    def _adopt(self, ranges: list[Range]) -> None:
        owners: list[Address | None] = [None] * SLOTS
        for start, end, master, replicas in ranges:
            owners[start : end + 1] = [master] * (end + 1 - start)
            self._known.update(dict.fromkeys((master, *replicas)))
        self._owners = owners
        masters = {owner for owner in owners if owner is not None}
        # A node that left must not be asked for ever; the seeds stay, whatever happens.
        current = {address for piece in ranges for address in (piece.master, *piece.replicas)}
        self._known = {address: None for address in self._known if address in current or address in self.url.addresses}
        for address in masters:
            self._link_to(address)
        for address in self._links.keys() - masters:
            self._links.pop(address).retire()
        self._assign_channels()
        self._change()

    def _assign_channels(self) -> None:
        by_owner = self._by_owner(self._channels)
        for address, link in list(self._subscription_links.items()):
            wanted = by_owner.get(address, set())
            left = link.wanted - wanted
            moved = link.confirmed & left
            link.unwant(left)
            if moved:
                self._unconfirmed(frozenset(moved))
            if not wanted:
                self._subscription_links.pop(address).retire()
        for address, wanted in by_owner.items():
            self._subscription_to(address).want(wanted)

    # Redirections

    def _on_error(self, link: CommandLink, reply: Reply, error: RedisError) -> bool:
        if error.code in ("MOVED", "ASK"):
            redirection = error.redirection()
            if redirection is None or reply.tries >= _TRIES:
                return False
            slot, host, port = redirection
            assert link.node is not None
            target = Address(host or link.node.address.host, port)
            reply.tries += 1
            if error.code == "MOVED":
                self._owners[slot] = target
                self._stale.set()
            self._send_to(target, reply, asking=error.code == "ASK")
            return True
        if error.code == "TRYAGAIN" and reply.tries < _TRIES and self._nursery is not None:
            reply.tries += 1
            self._nursery.start_soon(self._send_later, reply)
            return True
        if error.code == "CLUSTERDOWN":
            self._stale.set()
        return super()._on_error(link, reply, error)

    def _send_to(self, address: Address, reply: Reply, *, asking: bool) -> None:
        link = self._link_to(address)
        if link.up:
            link.put_again(reply, asking=asking)
        elif self._nursery is not None:
            self._nursery.start_soon(self._send_on_arrival, link, reply, asking)
        else:
            reply.settle(NotConnectedError(link.reason))

    async def _send_on_arrival(self, link: CommandLink, reply: Reply, asking: bool) -> None:
        try:
            with trio.move_on_after(_ARRIVAL_S):
                await link.wait_up()
            link.put_again(reply, asking=asking)
        except trio.Cancelled:  # the client was closed while the command was between two nodes
            reply.settle(NotConnectedError("the client was closed"))
            raise

    async def _send_later(self, reply: Reply) -> None:
        try:
            await trio.sleep(_TRY_AGAIN_S)
            try:
                link = self._link_for(reply.slot)
            except NotConnectedError as error:
                reply.settle(error)
            else:
                link.put_again(reply)
        except trio.Cancelled:
            reply.settle(NotConnectedError("the client was closed"))
            raise
