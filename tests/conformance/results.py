"""What the suites of this directory found, kept for ``docs/conformance.md``."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass
class Results:
    """Counts by suite and part.

    Attributes:
        long: everything is run, not what fits into the time of ordinary tests.
        parts: for each suite what it is made of, with the number of cases by verdict.
        seconds: for each suite, by the clock.
    """

    long: bool
    parts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, suite: str, part: str, verdicts: dict[str, int]) -> None:
        """Note what came of one part of a suite."""
        self.parts.setdefault(suite, {})[part] = verdicts

    def took(self, suite: str, seconds: float) -> None:
        """Note how long a suite ran."""
        self.seconds[suite] = round(seconds, 1)

    def saved(self) -> dict[str, Any]:
        """As JSON has it."""
        date = datetime.now(UTC).date().isoformat()
        return {"date": date, "parts": self.parts, "seconds": self.seconds}
