"""The results in words and numbers: a table to read, and those of the documents."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any, Final

from perf.measure import UNDISTURBED, Measure
from perf.peers.measures import IDLE, PACED, SATURATED, SETUP, SINGLE, SPREAD

OURS: Final = "statuswire"
NAMES: Final = {"ws": "WebSocket", "sse": "SSE", "poll": "Long-poll"}
COLUMNS: Final = (*SATURATED, *SINGLE, *PACED, *SPREAD, *SETUP, *IDLE)
SHORT: Final = {
    "cpu8": "CPU/delivery ≤ 8 in flight, µs",
    "joined8": "updates/read",
    "cpu1": "CPU/delivery 1 in flight, µs",
    "p99": "p99 at 10/s, ms",
    "spread_p99": "100 channels 10,000/s p99, ms",
    "spread_core": "core used there",
    "setup": "CPU/connection, µs",
    "idle": "bytes/idle connection",
}
Result = dict[str, Any]


def value(part: dict[str, Any], measure: Measure) -> str:
    """One number; `*` if others had too much of a core meanwhile, `fails` if there is none."""
    cell = part["cells"].get(measure.key)
    if cell is None:
        return "fails" if measure.key in part["failed"] or "" in part["failed"] else "-"
    return _number(cell["theirs"], measure) + _mark(cell)


def ours(parts: list[dict[str, Any]], transport: str, measure: Measure) -> tuple[list[float], list[float]]:
    """This server's rounds beside all peers, and what others had of a core in them."""
    found: list[float] = []
    others: list[float] = []
    for part in parts:
        cell = part["cells"].get(measure.key)
        if part["transport"] == transport and cell is not None:
            found += cell["theirs" if part["peer"] == OURS else "ours"]
            others += cell["others"]
    return found, others


def rows(result: Result, transport: str) -> list[list[str]]:
    """Names and numbers of one transport, this server first; behind each number how many times ours it is."""
    parts = result["parts"]
    line = [OURS]
    for measure in COLUMNS:
        numbers, others = ours(parts, transport, measure)
        mark = "*" if others and statistics.median(others) >= UNDISTURBED else ""
        line.append(_number(numbers, measure) + mark if numbers else "-")
    lines = [line]
    for part in parts:
        if part["transport"] == transport and part["peer"] != OURS:
            name = f"{part['peer']} {part['version']}".strip()
            lines.append([name, *(f"{value(part, measure)}{_times(parts, part, measure)}" for measure in COLUMNS)])
    return lines


def _number(numbers: list[float], measure: Measure) -> str:
    return f"{statistics.median(numbers):,.{measure.digits}f}"


def _mark(cell: dict[str, Any]) -> str:
    return "*" if max(cell["others"]) >= UNDISTURBED else ""


def _times(parts: list[dict[str, Any]], part: dict[str, Any], measure: Measure) -> str:
    cell = part["cells"].get(measure.key)
    if cell is None or measure.key == "joined8":
        return ""
    if cell["ours"]:
        found = [theirs / mine for mine, theirs in zip(cell["ours"], cell["theirs"], strict=True) if mine]
    else:
        mine = ours(parts, part["transport"], measure)[0]
        found = [statistics.median(cell["theirs"]) / statistics.median(mine)] if mine else []
    return f" ({statistics.median(found):.2f}x)" if found else ""


def load(result: Result) -> str:
    """What the load side used of its core."""
    lines = []
    for measure in COLUMNS:
        cells = [part["cells"][measure.key] for part in result["parts"] if measure.key in part["cells"]]
        mine = [share for cell in cells for share in cell["load"]]
        theirs = [share for cell in cells for share in cell["their_load"]]
        if measure.key in ("joined8", "spread_core") or not theirs:
            continue
        with_us = f"{statistics.median(mine):.0f} % with us, " if mine else ""
        lines.append(
            f"{measure.label}: {with_us}{statistics.median(theirs):.0f} % (at most {max(theirs):.0f} %) with peers"
        )
    return "\n".join(lines)


def about(result: Result) -> str:
    """The machine, in one line."""
    machine = result["machine"]
    return (
        f"{machine['time']}: {machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, "
        f"CPython {machine['python']}, load average {machine['load_average'][0]:.1f}; {result['seconds']:.0f} s in all."
    )


def failures(result: Result) -> list[str]:
    """Who failed what, and how."""
    found = []
    for part in result["parts"]:
        for key, why in part["failed"].items():
            found.append(
                f"{NAMES[part['transport']]}, {part['peer']}, {SHORT.get(key, 'all')}: {' '.join(why.split())}"
            )
    return found


def text(result: Result) -> str:
    """All tables, for a terminal."""
    out = [about(result)]
    for transport, name in NAMES.items():
        lines = [[name, *(SHORT[measure.key] for measure in COLUMNS)], *rows(result, transport)]
        if len(lines) == 2:
            continue
        turned = list(zip(*lines, strict=True)) if len(lines) < 4 else lines
        widths = [max(len(line[column]) for line in turned) for column in range(len(turned[0]))]
        out.append("")
        out += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in turned
        ]
    out += ["", "(n x): times this server's, in the rounds beside it. *: others used the cores, proves nothing.", ""]
    out += ["Load side, share of its core:", load(result)]
    if failed := failures(result):
        out += ["", *failed]
    return "\n".join(out)


def markdown(result: Result, source: str) -> str:
    """The same for docs/performance.md."""
    out = [about(result), "", "![CPU for each delivery](img/peers-cpu.png)", ""]
    out += ["![Latency](img/peers-latency.png)", "", "![Connections](img/peers-connections.png)"]
    for transport, name in NAMES.items():
        out += ["", f"**{name}**", ""]
        out.append("| | " + " | ".join(SHORT[measure.key] for measure in COLUMNS) + " |")
        out.append("|---|" + "---|" * len(COLUMNS))
        out += ["| " + " | ".join(line) + " |" for line in rows(result, transport)]
    out += ["", "Share of its core that the load side used:", ""]
    out += [f"- {line}" for line in load(result).splitlines()]
    if failed := failures(result):
        out += ["", "What failed:", "", *(f"- {line}" for line in failed)]
    out += ["", f"Every round's numbers: `{source}`."]
    return "\n".join(out)


def summary() -> str:
    """The picture for the README."""
    return "![CPU for each delivery, beside other servers](docs/img/peers-cpu.png)"


def fill(path: Path, name: str, content: str) -> None:
    """Replaces what stands between the markers of this name. Raises OSError if they are not there."""
    old = path.read_text()
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(old):
        raise OSError(f"{path} has no {begin} … {end}")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{content}\n{end}", old))
