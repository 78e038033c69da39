"""All benchmarks, one table: `python -m perf.bench [--quick] [--only fanout,publish,…] [--json FILE]`.

A whole run writes the table and every round's numbers to perf/results/, and its plots to docs/img/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from perf import connect, crowd, fanout, features, ingest, nodes, plot, publish, publish_ways, sweep
from perf.load import LoadError, build
from perf.measure import ROOT, Row, Start, bare, server, take_core
from perf.peers.table import fill

TRANSPORTS = ("ws", "sse")


def parts(start: Start, quick: bool, program: str | None) -> dict[str, Callable[[], list[Row]]]:
    """What can be run, by name."""
    return {
        **{f"fanout-{transport}": partial(fanout.run, start, transport, quick=quick) for transport in TRANSPORTS},
        "publish": partial(publish.run, start, quick=quick),
        "publish-ways": partial(publish_ways.run, start, program, quick=quick),
        **{f"connect-{transport}": partial(connect.run, start, transport, quick=quick) for transport in TRANSPORTS},
        "ingest": partial(ingest.run, program, quick=quick),
        "crowd": partial(crowd.run, partial(server, program=program), quick=quick),
        "nodes": partial(nodes.run, program, quick=quick),
        **{f"sweep-{transport}": partial(sweep.run, start, transport, quick=quick) for transport in TRANSPORTS},
        "features": partial(features.run, program, quick=quick),
    }


def number(value: float | None, digits: int) -> str:
    """Right for reading: grouped thousands, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(rows: list[Row]) -> str:
    """The one table."""
    lines = [("", "statuswire", "bare", "ratio", "", "load busy", "others")]
    scenario = ""
    for row in rows:
        measure = row.measure
        if row.scenario != scenario:
            scenario = row.scenario
            lines.append((scenario, "", "", "", "", "", ""))
        theirs = statistics.median(row.bare) if row.bare else None
        lines.append(
            (
                f"  {measure.label}{f' [{measure.unit}]' if measure.unit else ''}",
                number(statistics.median(row.server), measure.digits),
                number(theirs, measure.digits),
                number(row.ratio(), 2),
                row.verdict() + promise(row),
                f"{statistics.median(row.load):.0f} %",
                f"{max(row.others):.0f} %",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(line[column].rjust(widths[column]) for column in (1, 2, 3))]
        cells += [line[4].ljust(widths[4]), line[5].rjust(widths[5]), line[6].rjust(widths[6])]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def promise(row: Row) -> str:
    """What must hold, in a few characters."""
    measure = row.measure
    if measure.ratio_most is not None:
        return f" (≤ {measure.ratio_most:g}x)"
    if measure.value_most is not None:
        return f" (≤ {measure.value_most:,.0f})"
    if measure.value_least is not None:
        return f" (≥ {measure.value_least:,.0f})"
    return ""


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("statuswire", "trio", "h11", "wsproto", "msgspec")},
        "load_average": os.getloadavg(),
    }


def about(facts: dict[str, Any]) -> str:
    """The machine, in a line."""
    return (
        f"{facts['time']}: {facts['cores']} cores of {facts['cpu']}, Linux {facts['kernel']}, "
        f"CPython {facts['python']}, Trio {facts['packages']['trio']}, load average {facts['load_average'][0]:.1f}"
    )


def as_json(rows: list[Row], seconds: float, quick: bool) -> str:
    """Everything, the single rounds too."""
    out = []
    for row in rows:
        out.append(
            {
                "scenario": row.scenario,
                "measure": asdict(row.measure),
                "server": row.server,
                "bare": row.bare,
                "load_percent": row.load,
                "others_percent": row.others,
                "ratio": row.ratio(),
                "verdict": row.verdict(),
            }
        )
    return json.dumps({"machine": machine(), "seconds": seconds, "quick": quick, "rows": out}, indent=1)


def main() -> int:
    """Exit status 1 with `--check` when a promise was missed, 2 when something did not run."""
    parser = argparse.ArgumentParser(prog="perf.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke run: one short round each, 1,000 idle connections")
    parser.add_argument(
        "--only",
        default="",
        help="comma list of fanout, publish, connect, ingest, crowd, nodes, sweep, features; -ws or -sse narrows",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's numbers there")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise was missed")
    parser.add_argument("--program", help="another statuswire to measure (default: .venv/bin/statuswire)")
    parser.add_argument(
        "--null", action="store_true", help="the bare loop in the server's place: how good the method is"
    )
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to lose to a disturbed machine (%(default)s)"
    )
    options = parser.parse_args()
    start: Start = (lambda _store: bare()) if options.null else partial(server, program=options.program)
    wanted = [name for name in options.only.split(",") if name]
    take_core("perf.bench", 0 if options.quick else options.patience)
    build()
    began = time.monotonic()
    rows: list[Row] = []
    failed = []
    for name, run in parts(start, options.quick, options.program).items():
        if options.null and name in ("publish-ways", "ingest", "crowd", "nodes", "features"):
            continue  # no bare loop stands beside the servers there
        if wanted and not any(name.startswith(prefix) for prefix in wanted):
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        since = time.monotonic()
        try:
            rows += run()
            print(f"{name}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
        except (OSError, LoadError) as error:
            failed.append(f"{name}: {error}")
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    text = (
        f"{about(machine())}; {seconds:.0f} s in all.\nServer on one core, load on the other; medians of rounds by "
        f"turns with the bare loop. How to read this: perf/README.md\n\n{table(rows)}\n"
    )
    result = as_json(rows, seconds, options.quick)
    if rows:
        print(text, end="")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(result + "\n")
    if not (failed or wanted or options.quick or options.null or options.program):
        name = f"perf/results/{time.strftime('%Y-%m-%d', time.gmtime())}-self"
        (ROOT / f"{name}.txt").write_text(text)
        (ROOT / f"{name}.json").write_text(result + "\n")
        plot.draw(json.loads(result), ROOT / "docs/img/self.png")
        shown = f"{about(machine())}; {seconds:.0f} s in all. All lines: `{name}.txt`."
        picture = "![CPU of deliveries, of updates published, and of what is switched on](img/self.png)"
        fill(ROOT / "docs/performance.md", "self", f"{shown}\n\n{picture}")
        print(f"Written: {name}.txt, {name}.json, docs/img/self.png, docs/performance.md")
    if failed:
        return 2
    return int(options.check and any(row.verdict() == "MISSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
