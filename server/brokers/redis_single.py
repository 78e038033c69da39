"""The client of one Redis, and of the master that sentinels name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypedDict, Unpack

import trio
from trio.abc import Stream

from protocol.resp import Argument, RedisError, Value, encode
from server.brokers.redis_connection import NodeInfo, connect
from server.brokers.redis_errors import RedisStartError
from server.brokers.redis_link import CommandLink, Connect, Link, Reply, Script, guarded, log
from server.brokers.redis_subscriptions import SubscriptionLink
from server.brokers.redis_topology import find_master
from server.brokers.redis_url import Address, Options, RedisUrl

# Between attempts to start while Redis is loading, unreachable or electing.
_TRY_AGAIN_S: Final = 0.1


class Callbacks(TypedDict, total=False):
    """What a client tells its user, each called synchronously on the Trio thread.

    Attributes:
        on_up: a connection for commands was made, to this node. Commands can be sent from within.
        on_down: it was lost, or a first one failed; the reason names the node. In a cluster once per node.
        on_message: ``(channel, payload)`` of a subscription, in order.
        on_subscribed: channels whose messages come from now on, after the first subscription and after each
            reconnection; what was published before may have been missed and must be read elsewhere.
        on_lost: channels whose messages do not come any more, until ``on_subscribed`` names them again.
    """

    on_up: Callable[[NodeInfo], object]
    on_down: Callable[[str], object]
    on_message: Callable[[bytes, bytes], object]
    on_subscribed: Callable[[frozenset[bytes]], object]
    on_lost: Callable[[frozenset[bytes]], object]


class Client:
    """A single Redis, or the master that sentinels name.

    Everything but waiting is synchronous, and every callback is called synchronously on the Trio thread.

    Args:
        url: parsed.
        options: how patient to be.
        callbacks: see ``Callbacks``.
    """

    sharded = False
    """Whether messages have to be published with SPUBLISH instead of PUBLISH to reach subscribers."""
    subscription_kind: type[SubscriptionLink] = SubscriptionLink
    """How subscriptions are spoken of."""

    def __init__(self, url: RedisUrl, *, options: Options | None = None, **callbacks: Unpack[Callbacks]) -> None:
        self.url = url
        self.options = options or Options()
        self.subscribed: set[bytes] = set()
        """Channels whose messages are coming."""
        self._callbacks = callbacks
        self._scripts: dict[str, Script] = {}
        self._nursery: trio.Nursery | None = None
        self._changed = trio.Event()  # replaced whenever a link or a subscription changes
        self._sentinels = url.addresses  # the one that answered last comes first
        self._link = self._command_link(self._connect)
        self._subscription: SubscriptionLink | None = None

    # Life

    async def start(self) -> None:
        """Check that everything is right: reachable, the right password, a database that exists, a new enough Redis.

        Raises:
            RedisStartError: after ``start_patience_s`` for what may pass by itself, at once for what will not.
        """
        give_up = trio.current_time() + self.options.start_patience_s
        while True:
            try:
                await self._check()
                return
            except RedisStartError as error:
                if not error.passing or trio.current_time() + _TRY_AGAIN_S > give_up:
                    raise
            await trio.sleep(_TRY_AGAIN_S)

    async def run(self) -> None:
        """Be connected, until cancelled. Raises nothing that the network or Redis could cause."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._run_in(nursery)
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def wait_up(self) -> None:
        """Return when commands can be sent (in a cluster: for every slot)."""
        while self.away is not None:
            await self._changed.wait()

    @property
    def away(self) -> str | None:
        """Why commands cannot be sent just now; None if they can (in a cluster: for every slot)."""
        return None if self._link.up else self._link.reason

    @property
    def pending(self) -> int:
        """Commands that were sent or queued and have no answer yet."""
        return self._link.pending

    # Commands

    def send(self, *command: Argument, key: bytes | str | None = None) -> Reply:
        """Queue a command; all that are queued in one pass of the loop go out in one write, in order.

        Args:
            command: its name and arguments.
            key: any key of the slot that a cluster is to be asked for, if it does not follow from the command.

        Raises:
            NotConnectedError, OverloadedError: it was not queued.
            CrossSlotError: in a cluster, its keys do not belong together.
        """
        reply = Reply(encode(command))
        self._link.put(reply)
        return reply

    def send_script(
        self,
        script: Script,
        keys: Sequence[bytes | str],
        arguments: Sequence[Argument],
        *,
        key: bytes | str | None = None,
    ) -> Reply:
        """Queue a call of a script by its hash; if Redis does not know it, it is sent again with its body.

        A script that was sent again runs after those that were queued meanwhile: after a SCRIPT FLUSH the order of
        some calls changes. The first use registers the script, and every later connection begins by loading it.

        Raises:
            As ``send``.
        """
        self._scripts.setdefault(script.sha, script)
        rest = (len(keys), *keys, *arguments)
        reply = Reply(encode(("EVALSHA", script.sha, *rest)))
        reply.script = script
        reply.rest = rest
        self._route(reply, keys if key is None else (key,))
        return reply

    def _route(self, reply: Reply, keys: Sequence[Argument]) -> None:
        self._link.put(reply)

    async def call(self, *command: Argument, key: bytes | str | None = None, patience: float = 0.0) -> Value:
        """Send a command and wait for its answer.

        Args:
            command, key: see ``send``.
            patience: seconds to wait for a connection if there is none.

        Raises:
            RedisError: Redis' own answer.
            ConnectionLostError: it may or may not have been executed, see ``sent``.
            NotConnectedError, OverloadedError, CrossSlotError: it was not.
        """
        await self._be_patient(patience)
        return await self.send(*command, key=key).wait()

    async def call_script(
        self, script: Script, keys: Sequence[bytes | str], arguments: Sequence[Argument], *, patience: float = 0.0
    ) -> Value:
        """``send_script`` and wait; raises as ``call``."""
        await self._be_patient(patience)
        return await self.send_script(script, keys, arguments).wait()

    async def _be_patient(self, seconds: float) -> None:
        if seconds > 0 and self.away is not None:
            with trio.move_on_after(seconds):
                await self.wait_up()

    # Subscriptions

    def subscribe(self, channels: Iterable[bytes | str]) -> None:
        """Ask for the messages of more channels, now and after every reconnection; ``on_subscribed`` confirms."""
        self._subscriptions().want(_bytes(channels))

    def unsubscribe(self, channels: Iterable[bytes | str]) -> None:
        """Take channels back. Messages that are under way still come."""
        gone = _bytes(channels)
        self.subscribed -= gone
        self._subscriptions().unwant(gone)

    async def wait_subscribed(self, channels: Iterable[bytes | str]) -> None:
        """Return when all these channels are confirmed at once."""
        wanted = _bytes(channels)
        while not wanted <= self.subscribed:
            await self._changed.wait()

    def _subscriptions(self) -> SubscriptionLink:
        if self._subscription is None:  # no connection for those who never subscribe
            self._subscription = self._subscription_link(self._connect)
            if self._nursery is not None:
                self._nursery.start_soon(self._subscription.run)
        return self._subscription

    # Links

    def _run_in(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._link.run)
        if self._subscription is not None:
            nursery.start_soon(self._subscription.run)
        if self.url.topology == "sentinel":
            nursery.start_soon(self._sentinel_watch().run)

    async def _check(self) -> None:
        stream, _ = await self._connect()
        await trio.aclose_forcefully(stream)

    async def _connect(self) -> tuple[Stream, NodeInfo]:
        if self.url.topology != "sentinel":
            return await connect(self.url.addresses[0], self.url, self.options)
        master = await self._find_master()
        try:
            return await connect(master, self.url, self.options)
        except RedisStartError:
            # A sentinel that was cut off from the others goes on naming the old master: ask another one next time.
            self._sentinels = (*self._sentinels[1:], self._sentinels[0])
            raise

    def _command_link(self, connect: Connect) -> CommandLink:
        return CommandLink(
            connect,
            self.options,
            on_up=self._went_up,
            on_down=self._went_down,
            scripts=self._scripts,
            on_error=self._on_error,
        )

    def _subscription_link(self, connect: Connect) -> SubscriptionLink:
        return self.subscription_kind(
            connect,
            self.options,
            on_down=lambda reason: log.info("The subscriptions are interrupted: %s", reason),
            sharded=self.sharded,
            group=self._group,
            on_message=self._callbacks.get("on_message", lambda channel, payload: None),
            on_subscribed=self._confirmed,
            on_lost=self._unconfirmed,
            on_refused=self._refused,
        )

    def _group(self, channels: Iterable[bytes]) -> Iterable[Sequence[bytes]]:
        return (list(channels),)

    def _refused(self) -> None:
        """The subscriptions' node would not take channels."""

    def _went_up(self, node: NodeInfo) -> None:
        self._change()
        if self.url.topology == "sentinel" and self._nursery is not None:
            # The master may have been replaced between the sentinel's answer and our arrival.
            self._nursery.start_soon(self._verify_master)
        guarded(self._callbacks.get("on_up"), node)

    def _went_down(self, reason: str) -> None:
        self._change()
        guarded(self._callbacks.get("on_down"), reason)

    def _confirmed(self, channels: frozenset[bytes]) -> None:
        self.subscribed |= channels
        self._change()
        guarded(self._callbacks.get("on_subscribed"), channels)

    def _unconfirmed(self, channels: frozenset[bytes]) -> None:
        self.subscribed -= channels
        self._change()
        guarded(self._callbacks.get("on_lost"), channels)

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _on_error(self, link: CommandLink, reply: Reply, error: RedisError) -> bool:
        if error.code == "NOSCRIPT" and reply.script is not None:
            reply.data = encode(("EVAL", reply.script.body, *reply.rest))
            reply.script = None  # once
            link.put_again(reply)
            return True
        if error.code == "READONLY":
            link.drop("it is not the master any more")
        return False

    # Sentinels

    async def _find_master(self) -> Address:
        master, sentinel = await find_master(self.url, self.options, self._sentinels)
        self._sentinels = (sentinel, *(other for other in self._sentinels if other != sentinel))
        return master

    def _sentinel_watch(self) -> SubscriptionLink:
        """Listens to a sentinel for a new master: the failover is known at once instead of after a silence."""

        async def any_sentinel() -> tuple[Stream, NodeInfo]:
            for sentinel in self._sentinels:
                try:
                    return await connect(sentinel, self.url, self.options, "sentinel")
                except RedisStartError as error:
                    problem = error
            raise problem

        def verify(channels: frozenset[bytes]) -> None:
            if self._nursery is not None:
                self._nursery.start_soon(self._verify_master)  # it may have changed before we listened

        link = SubscriptionLink(
            any_sentinel,
            self.options,
            on_down=lambda reason: log.info("No sentinel to listen to: %s", reason),
            sharded=False,
            group=self._group,
            on_message=self._switched,
            on_subscribed=verify,
            on_lost=lambda channels: None,
            on_refused=lambda: None,
        )
        link.want([b"+switch-master"])
        return link

    def _switched(self, channel: bytes, payload: bytes) -> None:
        """``<name> <old host> <old port> <new host> <new port>``"""
        words = payload.decode(errors="replace").split(" ")
        if len(words) == 5 and words[0] == self.url.master_name and words[4].isdigit():
            self._move_to(Address(words[3], int(words[4])))

    async def _verify_master(self) -> None:
        try:
            self._move_to(await self._find_master())
        except RedisStartError as error:
            log.info("The master cannot be verified: %s", error)

    def _move_to(self, master: Address) -> None:
        links: list[Link] = [self._link] if self._subscription is None else [self._link, self._subscription]
        for link in links:
            if link.node is None or link.node.address != master:
                link.drop(f"the master is at {master} now")


def _bytes(channels: Iterable[bytes | str]) -> set[bytes]:
    return {channel.encode() if isinstance(channel, str) else channel for channel in channels}
