"""Write what the suites found into ``docs/conformance.md``: ``python -m tests.conformance.report RESULTS…``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.conformance.http1_corpus import GROUPS

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"


def table(suite: str, parts: dict[str, dict[str, int]]) -> str:
    """One suite: a line for each part, and one for all."""
    verdicts = list(dict.fromkeys(verdict for found in parts.values() for verdict in found))
    lines = [["", "cases", *(verdict.lower() if verdict != "OK" else verdict for verdict in verdicts)]]
    lines.append(["---", *["---:"] * (len(verdicts) + 1)])
    total = dict.fromkeys(verdicts, 0)
    for part, found in parts.items():
        lines.append([part, str(sum(found.values())), *(str(found.get(verdict, 0)) for verdict in verdicts)])
        for verdict, count in found.items():
            total[verdict] += count
    lines.append(["**all**", str(sum(total.values())), *map(str, total.values())])
    return f"### {suite}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def exceptions() -> str:
    """The cases in which this server takes what nginx refuses."""
    cases = [(group, case) for group, group_cases in GROUPS.items() for case in group_cases if case.lenient]
    lines = [
        f"| {group}: {case.name} | {' '.join(map(str, case.answers))} | {case.lenient} |\n" for group, case in cases
    ]
    return "### More lenient than nginx, on purpose\n\n| case | answers | why |\n|---|---|---|\n" + "".join(lines)


def rendered(runs: list[dict[str, Any]]) -> str:
    """All of what stands between the marks."""
    text = []
    for run in runs:
        for suite, parts in run["parts"].items():
            text.append(table(suite, parts))
            text.append(f"{run['date']}, {run['seconds'][suite]:g} s.\n")
    return "\n".join([*text, exceptions()])


def main() -> None:
    """Replace what the document has between its marks."""
    runs = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + "\n" + rendered(runs) + "\n" + END + after)


if __name__ == "__main__":
    main()
