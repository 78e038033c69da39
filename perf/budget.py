"""The regression guard: instructions per delivery, publish and connection against perf/budget.json.

`python -m perf.budget` counts (under a minute, needs valgrind and gcc) and exits with 1 if something costs more than
its budget allows; `--write` makes what was counted the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from perf.counts import FEW, MANY, MANY_POLLS, WATCHED

HERE: Final = Path(__file__).parent
BUDGET: Final = HERE / "budget.json"
# Runs on one machine lie within 1 % of each other, whatever else it does, but for connections: how many of them are
# served in one pass differs, and their counts by up to 4.5 %. The same source on another build of Python
# differs by more, and not in all its parts alike: there the yardstick takes out what it can.
TOLERANCE: Final = 1.06
TOLERANCE_ELSEWHERE: Final = 1.25
LIMIT_S: Final = 300.0
SUMMARY: Final = re.compile(r"^desc: Trigger: Client Request: (.+?)$.*?^summary: (\d+)$", re.MULTILINE | re.DOTALL)


class BudgetError(Exception):
    """The instructions could not be counted."""


def python() -> str:
    """Which interpreter's counts these are."""
    return f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}"


def count() -> dict[str, float]:
    """Runs the workload: user-space instructions for one of each thing. Raises BudgetError."""
    with tempfile.TemporaryDirectory(prefix="statuswire-counts-") as name:
        directory = Path(name)
        library = directory / "marks.so"
        _run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "marks.c")])
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        valgrind.append(f"--callgrind-out-file={directory / 'counts'}")
        out = _run([*valgrind, sys.executable, "-m", "perf.counts", str(library)])
        times = json.loads(out.splitlines()[-1])
        # The summary, not the totals: these hold some of what was done while nothing counted. Each name is there twice,
        # first from the warm-up before anything was looked at.
        files = sorted(directory.glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        found = [match for path in files if (match := SUMMARY.search(path.read_text(errors="replace")))]
        return per_thing({match[1]: int(match[2]) for match in found}, times)


def _run(command: list[str]) -> str:
    # What measures coverage, or makes Python verbose, would be counted.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("COVERAGE_", "PYTHON", "COV_"))
    }
    environment |= {"PYTHONHASHSEED": "0", "PYTHONPATH": str(HERE.parent)}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment, cwd=HERE.parent
        )
    except FileNotFoundError:
        raise BudgetError(f"{command[0]} is not installed (make system)") from None
    except subprocess.TimeoutExpired:
        raise BudgetError(f"{command[0]} did not end within {LIMIT_S:.0f} s") from None
    if result.returncode:
        raise BudgetError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return result.stdout


def per_thing(sums: dict[str, int], times: dict[str, int]) -> dict[str, float]:
    """One of each: a delivery is the difference between many readers and few, which leaves the publish out; a channel,
    with its one delivery, that between many watched jobs and few."""
    if missing := times.keys() - sums.keys():
        raise BudgetError(f"no counts of {', '.join(sorted(missing))}")
    each = {name: sums[name] / number for name, number in times.items()}
    result = {name: value for name, value in each.items() if not name[-1].isdigit()}
    for name, reading, many in (
        ("delivery, ws", "ws", MANY),
        ("delivery, sse", "sse", MANY),
        ("channel", "channels", WATCHED),
        ("long-poll answer", "poll", MANY_POLLS),
    ):
        result[name] = (each[f"{reading} {many}"] - each[f"{reading} {FEW}"]) / (many - FEW)
    return {name: round(value, 1) for name, value in result.items()}


@dataclass(frozen=True)
class Line:
    """One comparison: instructions, and how many times the budget they are."""

    name: str
    counted: float
    budget: float
    ratio: float
    over: bool


def compare(counted: dict[str, float], budget: dict[str, Any], here: str) -> list[Line]:
    """Every count against its budget. `here`: whose counts these are; another's budget is scaled by the yardstick.

    Raises:
        BudgetError: the budget is for other things.
    """
    allowed: dict[str, float] = budget["instructions"]
    if counted.keys() != allowed.keys():
        raise BudgetError(f"{BUDGET.name} is for other things ({', '.join(sorted(allowed))}): make budget")
    same = budget["python"] == here
    scale = 1.0 if same else counted["yardstick"] / allowed["yardstick"]
    most = TOLERANCE if same else TOLERANCE_ELSEWHERE
    lines = []
    for name, value in counted.items():
        ratio = value / (allowed[name] * scale)
        lines.append(Line(name, value, allowed[name], ratio, ratio > most and name != "yardstick"))
    return lines


def main() -> int:
    """Exit status 1 when a budget is exceeded, 2 when nothing could be counted."""
    parser = argparse.ArgumentParser(prog="perf.budget", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make what is counted the budget")
    options = parser.parse_args()
    try:
        counted = count()
        if options.write:
            BUDGET.write_text(json.dumps({"python": python(), "instructions": counted}, indent=2) + "\n")
        budget = json.loads(BUDGET.read_text())
        lines = compare(counted, budget, python())
    except BudgetError as error:
        print(f"perf.budget: {error}", file=sys.stderr)
        return 2
    print(f"{'instructions':<22}{'counted':>12}{'budget':>12}  ratio")
    for line in lines:
        verdict = "  OVER BUDGET" if line.over else ""
        print(f"{line.name:<22}{line.counted:>12,.0f}{line.budget:>12,.0f}{line.ratio:>7.3f}{verdict}")
    if budget["python"] != python():
        print(f"The budget is of {budget['python']}, this is {python()}: scaled by the yardstick, tolerance 25 %.")
    if any(line.over for line in lines):
        print(
            "Make it cheaper; if the cost is worth it, `make budget` and say why in the commit message.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
