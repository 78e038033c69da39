"""What the model says: beside what was measured, and of fleets of any size.

`python -m perf.simulate` prints it, `--write` puts it into docs/scaling.md. With `--readers` it is a calculator for a
crowd of one's own; with `--node`, for one node under a load of one's own.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from perf.fleet import Crowd, Fleet, fleet
from perf.model import POINTS, Load, Outcome, simulate

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "scaling.md"
SIZES: Final = (10_000, 1_000_000, 100_000_000)
CROWDS: Final = {
    "everyone a job of their own now and then": Crowd(0),
    "half of them busy, an update a second": Crowd(0, active=0.5, rate=1.0),
    "ten readers watch each job": Crowd(0, watchers=10.0),
}
NODE_HEAD: Final = ("", "core", "model", "p50, ms", "model", "p99, ms", "model", "updates/send", "model")
FLEET_HEAD: Final = (
    "readers",
    "updates/s",
    "deliveries/s",
    "cells",
    "nodes (cores)",
    "Redis masters",
    "readers/node",
    "memory, GB",
    "Gbit/s out",
    "nodes follow from",
)


def points() -> list[tuple[str, ...]]:
    """Measured and simulated by turns, a line for each point."""
    lines = []
    for point in POINTS:
        found = simulate(point.load)
        pairs = (
            (point.core, found.core, 2),
            (point.p50, found.p50, 1),
            (point.p99, found.p99, 1),
            (point.updates_per_send, found.updates_per_send, 0),
        )
        lines.append(
            (
                point.name,
                *("-" if number is None else f"{number:.{digits}f}" for *both, digits in pairs for number in both),
            )
        )
    return lines


def further() -> list[tuple[str, ...]]:
    """Loads that were not measured, or not here: more readers, until a core is full."""
    loads = {
        "100 readers, 10,000/s": Load(10_000, 100, batch=100),
        "10,000 readers, 10/s": Load(10, 10_000),
        "10,000 readers, 1,000/s": Load(1_000, 10_000, batch=10),
        "1,500 readers, 10,000/s": Load(10_000, 1_500, batch=100),
    }
    return [(name, *_outcome(simulate(load))) for name, load in loads.items()]


def _outcome(found: Outcome) -> tuple[str, ...]:
    return (
        f"{found.core:.2f}",
        f"{found.p50:.1f}",
        f"{found.p99:.1f}",
        f"{found.updates_per_send:.0f}",
        f"{found.deliveries_per_s:,.0f}",
    )


def fleet_line(readers: int, found: Fleet) -> tuple[str, ...]:
    """One fleet in a line."""
    return (
        f"{readers:,}",
        f"{found.updates:,.0f}",
        f"{found.deliveries:,.0f}",
        f"{found.cells:,}",
        f"{found.nodes:,}",
        f"{found.masters:,}",
        f"{found.readers_per_node:,.0f}",
        f"{found.gigabytes:,.1f}",
        f"{found.gigabits:,.3g}",
        found.first,
    )


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def tables() -> dict[str, str]:
    """All of them, by the name of their place in the document."""
    found = {
        "points": table(NODE_HEAD, points()),
        "further": table(("", "core", "p50, ms", "p99, ms", "updates/send", "deliveries/s"), further()),
    }
    parts = []
    for name, crowd in CROWDS.items():
        lines = [fleet_line(size, fleet(replace(crowd, readers=size))) for size in SIZES]
        parts.append(f"{name[0].upper()}{name[1:]}:\n\n{table(FLEET_HEAD, lines)}")
    return found | {"fleets": "\n\n".join(parts)}


def fill(text: str, found: dict[str, str]) -> str:
    """The document with its tables made anew. Raises ValueError if it has no place for one."""
    for name, new in found.items():
        text, times = re.subn(
            rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)",
            lambda match, new=new: f"{match[1]}{new}\n{match[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        if times != 1:
            raise ValueError(f"{times} places for the table {name!r} in {DOCUMENT.name}")
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="perf.simulate", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    crowd = parser.add_argument_group("a fleet")
    crowd.add_argument("--readers", type=int)
    crowd.add_argument("--active", type=float, default=Crowd.active, help="share of readers whose job runs")
    crowd.add_argument("--rate", type=float, default=Crowd.rate, help="updates a second of each of these jobs")
    crowd.add_argument("--watchers", type=float, default=Crowd.watchers, help="readers of each update")
    crowd.add_argument("--size", type=int, default=Crowd.size, help="bytes of an update's message")
    crowd.add_argument("--return", dest="return_s", type=float, default=Crowd.return_s, metavar="SECONDS")
    node = parser.add_argument_group("one node, with --rate and --size")
    node.add_argument("--node", type=int, metavar="READERS", help="readers of each channel")
    node.add_argument("--channels", type=int, default=1)
    node.add_argument("--batch", type=int, default=1, help="updates in a request")
    options = parser.parse_args()
    if options.node is not None:
        load = Load(options.rate, options.node, options.channels, options.batch, options.size)
        print(
            table(("", "core", "p50, ms", "p99, ms", "updates/send", "deliveries/s"), [("", *_outcome(simulate(load)))])
        )
    elif options.readers is not None:
        crowd_ = Crowd(options.readers, options.active, options.rate, options.watchers, options.size, options.return_s)
        found = fleet(crowd_)
        print(table(FLEET_HEAD, [fleet_line(options.readers, found)]))
        print("\ncores by work: " + ", ".join(f"{name} {cores:,.2f}" for name, cores in found.loads.items()))
    elif options.write:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), tables()))
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
