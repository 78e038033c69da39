"""Rounds by turns: what is repeated, and what is not."""

from __future__ import annotations

import pytest

from perf.measure import PATIENCE, Measure, alone

EACH = (Measure("each", "each", "µs"),)


class Rounds:
    """Fails the first time."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, float]:
        self.times += 1
        if self.times == 1:
            raise OSError("not everything came")
        return {"each": 7.0, "load": 1.0, "others": 0.0}


def test_a_round_that_failed_is_repeated_while_there_is_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATIENCE, "wait_quiet", lambda: None)
    monkeypatch.setattr(PATIENCE, "left", 5.0)
    (row,) = alone("once more", EACH, 1, Rounds())
    assert row.server == [7.0]
    assert PATIENCE.left <= 4.0


def test_without_patience_a_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATIENCE, "left", 0.0)
    with pytest.raises(OSError, match="not everything came"):
        alone("at once", EACH, 1, Rounds())
