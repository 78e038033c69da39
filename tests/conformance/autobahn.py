"""The Autobahn test suite's fuzzing client, run against a server."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trio

from tests.integration.running import ROOT

# What there is, whole, and what is left out in a hurry: throughput, and a thousand messages for each of 216 sizes and
# parameters. Of those one size of each group, for the parameters are what can go wrong. In two parts, played at once:
# the first waits for most of its time.
EVERYTHING = (("*",),)
IN_A_HURRY = (
    (
        *("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"),
        *("9.1.1", "9.2.1", "9.3.5", "9.4.5", "9.5.1", "9.6.1", "9.7.1", "9.8.1"),
        *("12.1.2", "12.2.2", "12.3.2", "12.4.2", "12.5.2"),
    ),
    ("13.1.2", "13.2.2", "13.3.2", "13.4.2", "13.5.2", "13.6.2", "13.7.2"),
)
GROUPS = {
    "1": "framing",
    "2": "pings and pongs",
    "3": "reserved bits",
    "4": "opcodes",
    "5": "fragmentation",
    "6": "UTF-8",
    "7": "closing",
    "9": "limits and performance",
    "10": "automatic fragmentation",
    "12": "compression, payloads",
    "13": "compression, parameters",
}


@dataclass(frozen=True)
class Verdict:
    """What the suite found of one case: of its messages, and of how the connection was closed."""

    case: str
    behavior: str
    closing: str

    @property
    def group(self) -> str:
        """The first part of the case's number."""
        return self.case.partition(".")[0]


@cache
def wstest() -> Path:
    """The suite's program; it is installed if it is not there yet."""
    program = ROOT / ".venv" / "autobahn" / "wstest"
    subprocess.run(["make", "--silent", program.relative_to(ROOT)], check=True, cwd=ROOT)
    return program


def version() -> str:
    """Of the suite."""
    said = subprocess.run([wstest(), "--autobahnversion"], check=True, capture_output=True, text=True).stdout
    return said.split()[-1]


async def fuzz(url: str, cases: Sequence[str], directory: Path, agent: str = "statuswire") -> list[Verdict]:
    """Run these cases, whole groups as ``1.*``; its reports are in ``directory`` afterwards."""
    specification = {
        "outdir": str(directory / "reports"),
        "servers": [{"agent": agent, "url": url}],
        "cases": list(cases),
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    (directory / "cases.json").write_text(json.dumps(specification))
    program = await trio.to_thread.run_sync(wstest)
    with (directory / "wstest.log").open("wb") as log:
        command = [program, "--mode", "fuzzingclient", "--spec", directory / "cases.json"]
        await trio.run_process(command, stdout=log, stderr=log)
    found = json.loads((directory / "reports" / "index.json").read_text()).get(agent)
    assert found, (directory / "wstest.log").read_text()[-2000:]
    return [Verdict(case, each["behavior"], each["behaviorClose"]) for case, each in found.items()]


async def fuzz_parts(url: str, parts: Sequence[Sequence[str]], directory: Path) -> list[Verdict]:
    """Run these cases, each part by a process of its own."""
    found: list[list[Verdict]] = [[] for _ in parts]

    async def part(number: int, cases: Sequence[str]) -> None:
        place = directory / f"part{number}"
        place.mkdir()  # of our own
        found[number] = await fuzz(url, cases, place)

    async with trio.open_nursery() as nursery:
        for number, cases in enumerate(parts):
            nursery.start_soon(part, number, cases)
    return [verdict for verdicts in found for verdict in verdicts]


def counted(verdicts: Sequence[Verdict]) -> dict[str, Counter[str]]:
    """Behaviours by group, in the suite's order."""
    groups: dict[str, Counter[str]] = {group: Counter() for group in GROUPS}
    for verdict in verdicts:
        groups[verdict.group][verdict.behavior] += 1
    return {group: count for group, count in groups.items() if count}
