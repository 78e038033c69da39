"""How long a job will still take, from the way its progress went. Pure: times are unix milliseconds passed in.

The pace is recent percentage points over the milliseconds they took, where older points fade. Both sums fade alike,
and with progress rather than with time: so the pace of steady work does not depend on how often a worker reports, and
a long wait for one point slows the estimate at once.
"""

from __future__ import annotations

import math
from typing import Final

from protocol.update import Eta

# Percentage points of progress after which older ones count half. Picked so that one slow phase of a job shows
# within a few points while single jumps do not throw the estimate about.
_HALF_POINTS: Final = 10.0
# An estimate beyond ten years says nothing, and would leave the calendar sooner or later.
_LONGEST_MS: Final = 10 * 365 * 86_400_000


def advance(eta: Eta | None, progress: float, now_ms: int) -> Eta:
    """The state after a report of ``progress``.

    Progress that did not move keeps the estimated time of completion, so what remains shrinks towards it. Progress
    that fell (a parent that got more parts) keeps the pace.
    """
    if eta is None:
        return Eta(now_ms, progress)
    if progress == eta.progress:
        return eta
    if progress < eta.progress:
        gained, spent_ms = eta.gained, eta.spent_ms
    else:
        points = progress - eta.progress
        fade = 0.5 ** (points / _HALF_POINTS)
        gained = eta.gained * fade + points
        spent_ms = eta.spent_ms * fade + max(0, now_ms - eta.at_ms)
    return Eta(now_ms, progress, gained, spent_ms, _completion_ms(progress, gained, spent_ms, now_ms))


def remaining_s(done_ms: int, now_ms: int) -> int:
    """Whole seconds until ``done_ms``, rounded up; 0 when that is past."""
    return max(0, math.ceil((done_ms - now_ms) / 1000))


def _completion_ms(progress: float, gained: float, spent_ms: float, now_ms: int) -> int | None:
    if progress <= 0 or gained <= 0 or spent_ms <= 0:
        return None
    left_ms = (100 - progress) * spent_ms / gained
    return now_ms + round(left_ms) if left_ms <= _LONGEST_MS else None
