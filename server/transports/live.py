"""What WebSocket and event-stream connections have in common: presence, heartbeats, token expiry, drain."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Collection
from typing import ClassVar, Final

import trio

from protocol.notice import heard, reaches
from protocol.presence import Transport
from protocol.update import Update
from protocol.wire import WireForm
from server.auth import Identity
from server.config import Config
from server.logs import log_event
from server.node import LOG, Node
from server.poller import Peer
from server.reader import PushReader
from server.socketio import Socket
from server.wheel import Timer

# Nobody is given up for stale before this many heartbeats: signs of life are asked for that often only.
STALE_HEARTBEATS: Final = 4
# Seconds between heartbeats that say that this server is cut off from its store: so soon it is told that that is over.
NOT_LIVE_BEAT_S: Final = 5.0
# What a client is told whose connection was ended by ``disconnect``.
DISCONNECTED: Final = "disconnected by the application"


def stale_after(config: Config) -> float:
    """Seconds without a sign of life after which a connection is closed."""
    return max(config.health.stale_after, STALE_HEARTBEATS * config.server.heartbeat)


class LiveReader(PushReader, Peer):
    """A push connection with timers, and its own entry in ``node.presence`` (``Connected``).

    Attributes:
        transport, takes_notices: see ``Connected``; the same for all of a class.
        client_id: names this connection on all nodes.
        identity: whose it is, once that is known.
        username: what the user calls itself, if it said so.
        address: the client's.
        since_ms: unix milliseconds.
        channels: the named channels it has joined; kept by ``Presence``.
    """

    __slots__ = (
        "_beat_timer",
        "_expiry_timer",
        "_place",
        "address",
        "channels",
        "client_id",
        "identity",
        "node",
        "since_ms",
        "username",
    )

    transport: ClassVar[Transport]
    takes_notices: ClassVar[bool]

    def __init__(
        self,
        node: Node,
        sock: Socket,
        form: WireForm,
        *,
        client_id: str,
        address: str,
    ) -> None:
        super().__init__(sock, node.poller.tasks, node.hub, node.wheel, form, backlog_bytes=node.config.limits.backlog)
        self.node = node
        self.client_id = client_id
        self.identity: Identity | None = None
        self.username: str | None = None
        self.address = sys.intern(address)  # many come from one
        self.since_ms = int(time.time() * 1000)
        self.channels: Collection[str] = ()
        self._place = ""
        self._expiry_timer: Timer | None = None
        # Spread, or a thousand that came together would beat together for ever.
        self._beat_timer = node.wheel.after(node.config.server.heartbeat * (0.5 + random.random() / 2), self._beat)
        node.streams[self] = None
        node.counters.open(self.transport, self.heard_at)

    @property
    def send_timeout(self) -> float:
        """As it is configured."""
        return self.node.config.limits.send_timeout

    @property
    def user(self) -> str:
        """Whose it is, once that is known."""
        assert self.identity is not None
        return self.identity.user

    def enter(self, identity: Identity) -> None:
        """Its user is known now, and was admitted (``Presence.admit``)."""
        self.identity = identity
        self.expire_with(identity)
        self.node.presence.enter(self)
        # At debug level, because thousands come and go in a second.
        if LOG.isEnabledFor(logging.DEBUG):
            log_event(
                LOG,
                logging.DEBUG,
                "connected",
                clientId=self.client_id,
                user=identity.user,
                transport=self.transport,
                address=self.address,
            )

    def disconnect(self) -> None:
        """End it because the application says so. Must not wait."""
        self.finish("disconnected")

    def heard(self) -> set[str]:
        """The targets of notifications that reach it."""
        return heard(self.client_id, self.user, self.channels)

    def hears(self, notice: Update) -> bool:
        """Whether a notification is for it."""
        return self.takes_notices and self.identity is not None and reaches(notice, self.heard())

    def adopt(self, place: str) -> bool:
        """See ``Stream``."""
        self._place = place
        self.node.begin()
        self.node.poller.peers[self.sock.fileno()] = self
        return self.ended != ""

    async def turn(self) -> bool:
        """Read from the peer. Whatever goes wrong ends this connection and no other."""
        again = False
        try:
            if not self.ended:
                again = await self.serve()
        except BlockingIOError:
            pass
        except OSError:
            self.finish("closed")  # the peer may go at any time
        except Exception as error:
            self._failed(error)
        finally:
            if self.ended:
                await self._part()
        return again and not self.ended

    async def serve(self) -> bool:
        """Read once, and do what it asks for; ``finish`` at the end of the peer's sending.

        Raises what ``recv`` does. Returns whether there is more to do at once.
        """
        raise AssertionError("a transport must say how it serves")

    async def goodbye(self) -> None:
        """Say why it ends (``ended``), if the peer can still hear it. In a cancelled task: shielded, and bounded."""
        raise AssertionError("a transport must say goodbye")

    def on_end(self) -> None:
        """See that it is closed: by the turn that is under way, or now."""
        poller, fd = self.node.poller, self.sock.fileno()
        if poller.peers.get(fd) is self and not poller.interrupt(self):
            poller.release(fd, self._part)

    async def _part(self) -> None:
        """The end. Cleans up first, synchronously; what is awaited after that is bounded."""
        self.node.poller.peers.pop(self.sock.fileno(), None)
        try:
            self.close()
            await self.goodbye()
        except OSError:
            pass
        except Exception as error:
            self._failed(error)
        finally:
            self._let_go()

    def abandon(self) -> None:
        """The server stops: end without a word."""
        self.node.poller.peers.pop(self.sock.fileno(), None)
        self.close()
        self._let_go()

    def _let_go(self) -> None:
        self.sock.close()
        self.node.forget_socket(self._place)
        self.node.end()

    def _failed(self, error: Exception) -> None:
        self.node.counters.failed += 1
        log_event(LOG, logging.ERROR, "connection_failed", address=self.address, exc_info=error)
        self.finish("closed")

    def close(self) -> None:
        """Leave no trace. Synchronous, so cancellation cannot skip it."""
        self.finish("closed")
        self.node.presence.leave(self)
        if self.identity is not None:
            self.node.seen.note(self.identity.user)
        self._beat_timer.cancel()
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        self.hub.leave(self)
        if self in self.node.streams:
            del self.node.streams[self]
            self.node.counters.close(self.ended, self.wheel.now())
            if LOG.isEnabledFor(logging.DEBUG):
                log_event(
                    LOG,
                    logging.DEBUG,
                    "disconnected",
                    clientId=self.client_id,
                    user=None if self.identity is None else self.identity.user,
                    reason=self.ended,
                    seconds=time.time() - self.since_ms / 1000,
                )

    def expire_with(self, identity: Identity) -> None:
        """End when this identity's token does, unless a newer one comes first."""
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        if identity.expires_at is not None:
            left = max(0.0, identity.expires_at - time.time())
            self._expiry_timer = self.wheel.after(left, self._expired)

    def _expired(self) -> None:
        self._expiry_timer = None
        self.finish("expired")

    def check_health(self) -> None:
        """Note a sign of life if there is one; without one for too long, end it."""
        if self.alive():
            self.heard_at = trio.current_time()
        elif trio.current_time() - max(self.heard_at, self.wheel.resumed) > stale_after(self.node.config):
            self.finish("stale")

    def _beat(self) -> None:
        pause = self.node.config.server.heartbeat
        self._beat_timer = self.wheel.after(pause if self.node.broker.live else min(pause, NOT_LIVE_BEAT_S), self._beat)
        if self.alive():
            self.heard_at = trio.current_time()
        if self.caught_up:  # else more than a heartbeat is on its way
            self.heartbeat()

    def drain(self, delay_ms: int) -> None:
        """The server goes away: end, and have the client come back after ``delay_ms``. Must not wait."""
        raise AssertionError("a transport must say how it is drained")

    def alive(self) -> bool:
        """Whether the peer has given a sign of life that ``heard_at`` does not show yet."""
        return False

    def heartbeat(self) -> None:
        """Send a heartbeat. Must not wait."""
        raise AssertionError("a transport must say how it beats")
