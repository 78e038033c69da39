"""Starting, running and stopping one server process."""

from __future__ import annotations

import faulthandler
import gc
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

import server.routes  # noqa: F401  # whoever comes first should not wait for it
from server import systemd
from server.brokers.base import StoreError
from server.config import Config, ConfigError, is_loopback
from server.ids import new_id
from server.listener import Listener, ListenError, begin, close_listener, describe, open_tcp, open_unix
from server.logs import log_event
from server.node import LOG, Node
from server.socketio import receive
from server.systemd import HandedOver, take_sockets
from server.wheel import STOOD_STILL

if TYPE_CHECKING:
    from server.callbacks import Callbacks

# After the drain: for requests that were being answered, say a batch that is still committing.
FINISH_S: Final = 5.0
# And for the store after that.
STOP_S: Final = FINISH_S + 10.0
# For requests on connections that were accepted just before others are to accept.
SETTLE_S: Final = 0.5
# For a first heartbeat on a Redis that was there a moment ago.
JOIN_S: Final = 2.0
SWEEP_EVERY_S: Final = 60.0
# Live connections looked at in one go: half a millisecond's work.
HEALTH_PORTION: Final = 256
# Ten thousand may come in a few seconds, and freezing late is freezing after the pause.
FREEZE_CHECK_S: Final = 1.0
# Once this many more connections are open than at the last freeze, what they consist of is taken out of the
# collector's sight: a full collection over 10,000 connections is a pause of some 100 ms that finds nothing.
FREEZE_EVERY_CONNECTIONS: Final = 1000


class StartError(ConfigError):
    """The server cannot start; the message says why and what to do."""


class Worker(NamedTuple):
    """What one of several processes has from its supervisor, see ``server.workers``.

    Attributes:
        number: from 1.
        group: names all of them together.
        listeners: open sockets.
        orders: ``T`` and ``I`` for SIGTERM and SIGINT, ``Q`` to end at once, ``H`` for SIGHUP; its end is the
            supervisor's. What is sent there is that this worker is ready, and then that it is alive.
        watchdog_s: seconds within which a sign of life is wanted, None for none.
    """

    number: int
    group: str
    listeners: list[socket.socket]
    orders: socket.socket
    watchdog_s: float | None


READY: Final = b"r"
ALIVE: Final = b"a"


@asynccontextmanager
async def running(config: Config, worker: Worker | None = None) -> AsyncIterator[tuple[Node, list[str]]]:
    """Run a server within this block, alone or as one worker. Gives the node and the addresses it listens on.

    Leaving the block stops at once what still runs and closes the store; ``drain`` first for a graceful stop.

    Raises:
        StartError: an address or the store cannot be used.
    """
    async with AsyncExitStack() as stack:
        listeners = listen(config) if worker is None else worker.listeners
        for listener in listeners:
            # A Unix socket's path is not for a worker to remove.
            stack.callback(close_listener if worker is None else socket.socket.close, listener)
        try:
            node = Node(config) if worker is None else Node(config, group=worker.group, worker=worker.number)
            await node.broker.start()
        except (StoreError, ConfigError) as error:
            raise StartError(str(error)) from error
        node.hub.flushed = node.history.last
        node.callbacks = _callbacks(node)
        if node.shared is not None:
            # Imported here, as the Redis broker is.
            from server.ingest.service import Ingest

            node.ingest = Ingest(node)
        if config.queues:
            from server.ingest.queues.service import Queues

            node.queues = Queues(node)
        try:
            async with trio.open_nursery() as services:
                services.start_soon(node.broker.run)
                services.start_soon(node.hub.run)
                services.start_soon(node.wheel.run)
                services.start_soon(_housekeeping, node)
                services.start_soon(_check_health, node)
                if node.ingest is not None:
                    services.start_soon(node.ingest.run)
                if node.queues is not None:
                    services.start_soon(node.queues.run)
                if node.authenticator.hook is not None:
                    await services.start(node.authenticator.hook.run)  # the first caller, too, is asked about
                if node.callbacks is not None:
                    services.start_soon(node.callbacks.run)
                if node.cluster is not None:
                    # Before the first reader comes, so that none is let in past a limit that others have used up.
                    await node.cluster.wait_joined(JOIN_S)
                try:
                    async with trio.open_nursery() as connections:
                        node.poller.start(connections)
                        node.handed_over = [each.fileno() for each in listeners if isinstance(each, HandedOver)]
                        for listener in listeners:
                            begin(listener)  # a worker that cannot start should keep nobody waiting
                            node.poller.add(listener.fileno(), Listener(node, listener))
                        yield node, [describe(listener, tls=node.tls is not None) for listener in listeners]
                        connections.cancel_scope.cancel()
                finally:
                    node.poller.close()
                services.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await node.broker.close()


async def serve(config: Config, reload: Callable[[], Config], worker: Worker | None = None) -> int:
    """Serve until a signal says otherwise: SIGTERM or SIGINT drains, a second one ends at once, SIGHUP rereads.

    A worker obeys its supervisor's orders likewise. A signal of its own only drains it: a terminal and some supervisors
    send the same to every process, and that is not a second one.

    Returns:
        The exit status, 0.

    Raises:
        StartError: see ``running``.
    """
    few = _raise_descriptor_limit(config.server.max_connections)
    async with running(config, worker) as (node, addresses):
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            if worker is None:
                where = ", ".join(address + config.server.base_path for address in addresses)
                print(f"statuswire listening on {where} (store {config.store.label})", flush=True)
                systemd.notify("READY=1", f"STATUS=Serving on {where}")
            else:
                worker.orders.send(READY)
            if few is not None:
                advice = "raise LimitNOFILE (ulimit -n), or lower server.max_connections"
                log_event(LOG, logging.WARNING, "few_descriptors", limit=few, advice=advice)
            gc.collect()
            gc.freeze()
            async with trio.open_nursery() as nursery:
                begin = partial(_begin_drain, node, nursery)
                limit_s = systemd.watchdog_s() if worker is None else worker.watchdog_s
                if limit_s is not None:
                    faulthandler.enable()  # who hangs is ended with SIGABRT: say where
                    say = partial(systemd.notify, "WATCHDOG=1") if worker is None else partial(_say_alive, worker)
                    nursery.start_soon(systemd.keep_alive, limit_s, say)
                if worker is not None:
                    nursery.start_soon(_obey, worker.orders, node, reload, begin, nursery.cancel_scope)
                async for number in signals:
                    if number == signal.SIGHUP:
                        if worker is None:
                            systemd.reloading()
                            _reload(node, reload)
                            systemd.notify("READY=1")
                    elif not node.draining:
                        begin(number)
                    elif worker is None:
                        log_event(LOG, logging.WARNING, "stopped", reason="second signal")
                        break
                nursery.cancel_scope.cancel()
    return 0


def _say_alive(worker: Worker) -> None:
    with suppress(OSError):  # it has other news to read, or has gone
        worker.orders.send(ALIVE)


def _begin_drain(node: Node, nursery: trio.Nursery, number: int) -> None:
    # A person at the keyboard with nobody connected need not wait; a supervisor's proxies must have the time to see
    # that this server is going.
    seconds = node.config.server.drain if number == signal.SIGTERM or node.streams else 0.0
    if node.handed_over:
        # What comes from now on waits for the next server, and what has come a moment ago is still answered.
        seconds = max(seconds, SETTLE_S)
        for fd in node.handed_over:
            node.poller.peers.pop(fd, None)
    log_event(LOG, logging.INFO, "draining", seconds=seconds)
    if not node.worker:
        systemd.stopping(seconds + STOP_S)
    nursery.start_soon(_drain_then, node, seconds, nursery.cancel_scope)


async def _obey(
    orders: socket.socket,
    node: Node,
    reload: Callable[[], Config],
    begin: Callable[[int], None],
    scope: trio.CancelScope,
) -> None:
    """Do what the supervisor says. Without one, this worker must not go on alone."""
    while data := await receive(orders):
        for order in data.decode():
            if order == "H":
                _reload(node, reload)
            elif order == "Q":
                log_event(LOG, logging.WARNING, "stopped", reason="second signal")
                scope.cancel()
            elif not node.draining:
                begin(signal.SIGINT if order == "I" else signal.SIGTERM)
    if not node.draining:
        log_event(LOG, logging.ERROR, "supervisor_lost")
        begin(signal.SIGTERM)


async def drain(node: Node, seconds: float) -> None:
    """Stop gracefully: refuse new work, answer polls, end live streams spread over ``seconds``, finish requests."""
    ends = trio.current_time() + seconds
    node.start_drain()
    await node.answer_polls()
    await node.drain_streams(seconds)
    await trio.sleep_until(ends)
    node.end_intakes()
    with trio.move_on_after(FINISH_S):
        await node.wait_quiet()


async def _drain_then(node: Node, seconds: float, scope: trio.CancelScope) -> None:
    await drain(node, seconds)
    log_event(LOG, logging.INFO, "stopped", reason="drained")
    scope.cancel()


def _reload(node: Node, reload: Callable[[], Config]) -> None:
    try:
        node.reload(reload())
    except ConfigError as error:
        log_event(LOG, logging.ERROR, "reload_failed", reason=str(error))
    else:
        log_event(LOG, logging.INFO, "reloaded")


def _callbacks(node: Node) -> Callbacks | None:
    if not node.config.callbacks:
        return None
    # Imported here: who tells nobody does without.
    from server.callbacks import LEASE_S, Callbacks, Source

    lease = None
    if node.shared is not None:
        from server.brokers.redis_keys import CALLBACKS
        from server.brokers.redis_lease import Lease

        lease = Lease(node.shared.client, CALLBACKS, new_id(), LEASE_S)
    source = Source(node.broker, node.history, node.jobs, node.seen)
    return Callbacks(node.config.callbacks, source, lease)


def listen(config: Config) -> list[socket.socket]:
    """Take what was handed over, else open what the configuration says. Raises ConfigError."""
    given = take_sockets()
    for handed_over in given:
        _check_reach(config, handed_over)
    if given:
        return list(given)
    listeners: list[socket.socket] = []
    try:
        if config.server.tcp:
            listeners += open_tcp(config.server.host, config.server.port)
        if config.server.unix_socket:
            listeners.append(open_unix(config.server.unix_socket))
    except ListenError as error:
        for listener in listeners:
            close_listener(listener)
        raise StartError(str(error)) from error
    return listeners


def _check_reach(config: Config, listener: socket.socket) -> None:
    if listener.family == socket.AF_UNIX or not config.auth.open:
        return
    host = listener.getsockname()[0]
    if not is_loopback(host):
        raise StartError(
            f"the socket that was handed over listens on {host}: without auth everyone is an admin, so the server "
            "listens on loopback only; configure auth, or use ListenStream=127.0.0.1:… or a path"
        )


def _raise_descriptor_limit(connections: int) -> int | None:
    """One descriptor a connection, plus some for files: as far as this process may.

    Returns:
        The limit, if it is well below what is needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 1024
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    # A little below is the usual limit, and no use to bother people with.
    return hard if hard < 0.9 * wanted else None


async def _check_health(node: Node) -> None:
    """Look at the live connections from time to time, and end those that are stale."""
    while True:
        due = trio.current_time() + node.config.health.check_interval
        await trio.sleep_until(due)
        if trio.current_time() - due > STOOD_STILL:
            continue  # what came meanwhile has not been read yet
        for count, stream in enumerate(list(node.streams), 1):
            if stream in node.streams:
                stream.check_health()
            if count % HEALTH_PORTION == 0:
                await trio.lowlevel.checkpoint()


async def _housekeeping(node: Node) -> None:
    """Sweep idle tables, and keep the collector from walking over live connections again and again."""
    frozen = 0
    next_sweep = trio.current_time() + SWEEP_EVERY_S
    while True:
        due = trio.current_time() + FREEZE_CHECK_S
        await trio.sleep_until(due)
        node.counters.loop_late_s.append(max(0.0, trio.current_time() - due))
        if node.connections > frozen + FREEZE_EVERY_CONNECTIONS:
            gc.collect(1)  # the young only: what is garbage by now should not be frozen
            gc.freeze()
            frozen = node.connections
        elif node.connections < frozen // 2:
            gc.unfreeze()
            frozen = node.connections
        if trio.current_time() >= next_sweep:
            next_sweep += SWEEP_EVERY_S
            node.limits.sweep(trio.current_time())
