"""What becomes of clients when their process forks or ends."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from types import ModuleType
from typing import Final, Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """What has to know of it."""

    def at_exit(self) -> None: ...
    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self) -> None: ...


# The name of the threads that send.
THREAD: Final = "statuswire"

_clients: WeakSet[Forkable] = WeakSet()
_forking: list[Forkable] = []
_exit_registered_by = 0
# Held while modules are imported in the background, and while the default client is made: a fork in the middle of that
# would leave the child with half of it.
opening = threading.RLock()


def import_httpx() -> ModuleType:
    """The module; that takes 100 ms, which only a worker that reports something pays, and in the background."""
    with opening:
        import httpx

        logging.getLogger("httpx").addFilter(_is_the_workers)
        "".encode("idna")  # socket would import it with the first connection, and remember it as unknown in the child
    return httpx


def _is_the_workers(record: logging.LogRecord) -> bool:
    """httpx logs each request as INFO: several a second of ours would bury what the worker has to say."""
    return record.threadName != THREAD


def register(client: Forkable) -> None:
    """From now on this client is told."""
    _clients.add(client)


def register_exit() -> None:
    """This process has something to do at its end."""
    global _exit_registered_by
    if _exit_registered_by == os.getpid():
        return
    _exit_registered_by = os.getpid()
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is not None and process is not None and process.parent_process() is not None:
        # Children of multiprocessing leave by os._exit, which does not call what atexit knows.
        util.Finalize(None, _at_exit, exitpriority=0)
    else:
        atexit.register(_at_exit)


def _at_exit() -> None:
    for client in list(_clients):
        client.at_exit()


def _before_fork() -> None:
    opening.acquire()
    _forking[:] = list(_clients)
    for client in _forking:
        client.before_fork()


def _after_fork_in_parent() -> None:
    for client in _forking:
        client.after_fork_in_parent()
    _forking.clear()
    opening.release()


def _after_fork_in_child() -> None:
    global opening
    for client in _forking:
        client.after_fork_in_child()
    _forking.clear()
    opening = threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
