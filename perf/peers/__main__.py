"""This server beside its peers, in one run: `python -m perf.peers [--quick] [--only picows,nchan] [--dry]`.

Every peer is measured in pairs with this server, who is first changing: what disturbs the machine disturbs both.
Writes a table and every round's numbers to perf/results/, plots to docs/img/, and the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from perf.bench import machine
from perf.load import LoadError, build
from perf.measure import ROOT, Measure, Target, server, take_core
from perf.peers import measures, plot, table
from perf.peers.catalog import PEERS, Peer, Unavailable, started, version_of
from perf.peers.measures import CHANNELS, IDLE, PACED, READERS, SATURATED, SETUP, SINGLE, SPREAD, Failed, Round, Side
from perf.peers.rounds import Cell, pairs

TRANSPORTS = ("ws", "sse", "poll")


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    rounds: int
    short: float
    paced: float
    spread: float
    idle: int


FULL = Plan(rounds=2, short=0.3, paced=1.5, spread=0.8, idle=5000)
QUICK = Plan(rounds=1, short=0.2, paced=0.5, spread=0.3, idle=500)


@dataclass
class Part:
    """One peer over one transport."""

    transport: str
    peer: str
    what: str
    version: str
    cells: dict[str, Cell] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def beside(ours: Side, peer: Peer, plan: Plan) -> Part:
    """All pairs of this server and one peer; a measure that either fails is left out, and says why."""
    part = Part(ours.transport, peer.name, peer.what, version_of(peer))

    def attempt(wanted: Sequence[Measure], run: Callable[[], dict[str, Cell]]) -> None:
        try:
            part.cells |= run()
        except (Failed, LoadError, OSError) as error:
            part.failed |= dict.fromkeys((measure.key for measure in wanted), str(error)[:200])

    def both(wanted: Sequence[Measure], theirs: Side, run: Round) -> None:
        attempt(wanted, lambda: pairs(wanted, plan.rounds, partial(run, ours), partial(run, theirs)))

    def fan_out(theirs: Side) -> None:
        for readers in (ours, theirs):
            readers.open(READERS)
            measures.in_flight(readers, 0.05, 8)
        both(SATURATED, theirs, partial(measures.in_flight, seconds=plan.short, number=8))
        both(SINGLE, theirs, partial(measures.in_flight, seconds=plan.short, number=1))
        both(PACED, theirs, partial(measures.paced, seconds=plan.paced))

    with started(peer) as running, measures.side(running.target, ours.transport, running) as theirs:
        for last in (False, True):  # with one connection that hears nothing all of it fails: once more, with new ones
            try:
                fan_out(theirs)
                break
            except (Failed, LoadError) as error:  # what does not need all these readers is measured still
                if last:
                    wanted = (*SATURATED, *SINGLE, *PACED)
                    part.failed |= dict.fromkeys((measure.key for measure in wanted), str(error)[:200])
        if ours.transport != "poll":  # 100,000 deliveries/s would be as many requests
            for readers in (ours, theirs):
                readers.open(READERS, CHANNELS)
            both(SPREAD, theirs, partial(measures.spread, seconds=plan.spread))
        for readers in (ours, theirs):
            readers.client.ask("close", "closed")
    # After a flood that was too much for it, a peer is not what it was.
    with started(peer) as running, measures.side(running.target, ours.transport, running) as theirs:
        with contextlib.suppress(Failed):
            measures.setup(theirs, 0.1)
        both(SETUP, theirs, partial(measures.setup, seconds=plan.short))
    with started(peer) as running, measures.side(running.target, ours.transport, running) as theirs:
        attempt(IDLE, lambda: pairs(IDLE, 1, None, lambda: measures.idle(theirs, plan.idle)))
    return part


def ours_idle(transport: str, plan: Plan) -> Part:
    """This server's memory, once."""
    part = Part(transport, table.OURS, "", "")
    with server("memory:") as target, measures.side(target, transport, None) as side:
        part.cells |= pairs(IDLE, 1, None, lambda: measures.idle(side, plan.idle))
    return part


def measure(ours: Target, plan: Plan, wanted: Sequence[str]) -> list[Part]:
    """Everything."""
    parts = []
    for transport in TRANSPORTS:
        if not wanted:
            parts.append(ours_idle(transport, plan))
        with measures.side(ours, transport, None) as side:
            side.open(READERS)
            with contextlib.suppress(Failed):
                measures.in_flight(side, 0.3, 8)
            for peer in PEERS:
                if transport not in peer.transports or (wanted and peer.name not in wanted):
                    continue
                began = time.monotonic()
                try:
                    parts.append(beside(side, peer, plan))
                    said = ", ".join(f"{key}: {why}" for key, why in parts[-1].failed.items())
                except (Unavailable, Failed, LoadError) as error:
                    said = str(error)
                    parts.append(Part(transport, peer.name, peer.what, version_of(peer), failed={"": said[:200]}))
                seconds = time.monotonic() - began
                print(f"{transport} {peer.name}: {seconds:.0f} s {said}", file=sys.stderr, flush=True)
    return parts


def main() -> int:
    """Exit status 2 when a peer could not be run at all."""
    parser = argparse.ArgumentParser(prog="perf.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round of each: does it run? Implies --dry")
    parser.add_argument("--only", default="", help=f"comma list of {', '.join(peer.name for peer in PEERS)}")
    parser.add_argument("--dry", action="store_true", help="print the table and write nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers there")
    parser.add_argument(
        "--patience", type=float, default=30, help="seconds to lose to a disturbed machine (%(default)s)"
    )
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    if unknown := set(wanted) - {peer.name for peer in PEERS}:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    take_core("perf.peers", 0 if options.quick else options.patience)
    build()
    began = time.monotonic()
    with server("memory:") as ours:
        parts = measure(ours, QUICK if options.quick else FULL, wanted)
    result = {
        "machine": machine(),
        "seconds": round(time.monotonic() - began, 1),
        "quick": options.quick,
        "parts": [asdict(part) for part in parts],
    }
    print(table.text(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if not (options.dry or options.quick or wanted):
        name = f"perf/results/{time.strftime('%Y-%m-%d', time.gmtime())}-peers"
        (ROOT / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (ROOT / f"{name}.txt").write_text(table.text(result) + "\n")
        plot.draw(result, ROOT / "docs/img")
        table.fill(ROOT / "docs/performance.md", "peers", table.markdown(result, f"{name}.json"))
        table.fill(ROOT / "README.md", "peers", table.summary())
        print(f"Written: {name}.txt, {name}.json, docs/img/, docs/performance.md, README.md")
    return 2 if any("" in part.failed for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
