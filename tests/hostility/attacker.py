"""A process that attacks: ``python -m tests.hostility.attacker``, told what to do on stdin, a JSON object a line.

``{"attack", "port", "source", "token"}`` begins one; the answer is ``standing`` once all clients are where they want to
be. Any line ends it; the answer is what it came to.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict

import trio

from tests.hostility.attacks import ATTACKS, TLS_ATTACKS, Client, Prey, Totals
from tests.pacing import for_a_while

# Who is thrown out comes again, at this pace.
PAUSE_S = 0.02
STANDING_S = 60.0


async def attack(name: str, prey: Prey, lines: AsyncIterator[str]) -> None:
    """Attack until told to stop."""
    kind = (ATTACKS | TLS_ATTACKS)[name]
    many = min(kind.clients, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
    async with trio.open_nursery() as nursery:
        for _ in range(many):
            nursery.start_soon(live, kind.client, prey)
        with trio.move_on_after(STANDING_S):
            while prey.totals.standing < many:  # noqa: ASYNC110 - many may come at once, and one look is enough
                await trio.sleep(0.01)
        say("standing", prey.totals)
        await anext(lines)
        nursery.cancel_scope.cancel()
    say("over", prey.totals)


async def live(client: Client, prey: Prey) -> None:
    """One client, again and again."""
    while True:
        mine = Prey(prey.port, prey.source, prey.token, prey.totals)
        try:
            await client(mine)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            for stream in mine.streams:
                stream.socket.close()
        prey.totals.rounds += 1
        await for_a_while(PAUSE_S)


def say(what: str, totals: Totals) -> None:
    """Answer."""
    print(json.dumps({"is": what, **asdict(totals)}), flush=True)


async def main() -> None:
    """Do as told until stdin ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lines = read_lines()
    async for line in lines:
        order = json.loads(line)
        await attack(order["attack"], Prey(order["port"], order["source"], order["token"], Totals()), lines)


async def read_lines() -> AsyncIterator[str]:
    """Lines of stdin."""
    received = b""
    stream = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    while data := await stream.receive_some():
        received += data
        *lines, received = received.split(b"\n")
        for line in lines:
            yield line.decode()


if __name__ == "__main__":
    trio.run(main)
