"""A parent's progress from its parts, without races: whole-number sums that each change of a part adjusts.

Weights and progress are counted in millionths, so adding and taking away is exact and the order of events does not
matter: the sums equal those computed from scratch. One change costs the same with three parts as with a million.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from protocol.update import COMPLETED, ENDED, FAILED, QUEUED, STALLED, Job, Parts, Private

WEIGHT_UNIT: Final = 1_000_000
_PROGRESS_UNIT: Final = 1_000_000
_LOW_BITS: Final = 62
_LOW: Final = (1 << _LOW_BITS) - 1


class PartSteps(msgspec.Struct):
    """A parent's ``steps``: how many of its parts completed, are there, failed or were cancelled."""

    done: int
    total: int
    failed: int


class Share(NamedTuple):
    """What one part adds to its parent's sums; see ``Parts``."""

    weight: int
    weighted: int
    done: int
    failed: int


class _Progress(msgspec.Struct, gc=False):
    progress: float


_decode_progress = msgspec.json.Decoder(_Progress).decode


def share_of(part: Job) -> Share:
    """A part's share: an ended one counts 100 whatever its progress was."""
    latest, link = part.latest, part.private.link
    weight = link.weight if link is not None else 0
    if latest.status in ENDED:
        done = latest.status == COMPLETED
        return Share(weight, weight * 100 * _PROGRESS_UNIT, int(done), int(not done))
    return Share(weight, weight * round(_decode_progress(latest.body).progress * _PROGRESS_UNIT), 0, 0)


def moved(parts: Parts | None, before: Job | None, after: Job | None) -> Parts | None:
    """The sums after one part changed: ``before`` is None for a new part, ``after`` for a deleted one."""
    sums = parts or Parts()
    weight, weighted = _weights(sums)
    total, done, failed = sums.total, sums.done, sums.failed
    for part, sign in ((before, -1), (after, 1)):
        if part is not None:
            share = share_of(part)
            weight += sign * share.weight
            weighted += sign * share.weighted
            total += sign
            done += sign * share.done
            failed += sign * share.failed
    if total <= 0:
        return None
    high = weight >> _LOW_BITS, weighted >> _LOW_BITS
    return Parts(weight & _LOW, weighted & _LOW, total, done, failed, *high)


def _weights(parts: Parts) -> tuple[int, int]:
    """Its ``weight`` and ``weighted`` with all their bits."""
    return parts.weight + (parts.weight_high << _LOW_BITS), parts.weighted + (parts.weighted_high << _LOW_BITS)


def fitted(private: Private) -> Private:
    """With sums as stores take them, where an older version had each in one number, however large."""
    if private.parts is None:
        return private
    return msgspec.structs.replace(private, parts=moved(private.parts, None, None))


def mean_progress(parts: Parts) -> int | float:
    """The weighted mean, rounded half up to two decimals; whole numbers as int."""
    weight, weighted = _weights(parts)
    unit = weight * _PROGRESS_UNIT
    hundredths = (200 * weighted + unit) // (2 * unit)
    return hundredths // 100 if hundredths % 100 == 0 else hundredths / 100


def steps_of(parts: Parts) -> PartSteps:
    """What the parent shows as ``steps``."""
    return PartSteps(parts.done, parts.total, parts.failed)


def all_ended(parts: Parts) -> bool:
    """Whether no part is left to wait for."""
    return parts.done + parts.failed == parts.total


def end_of(parts: Parts) -> tuple[str, str | None]:
    """Status and error of a parent that ends by itself."""
    if parts.failed:
        return FAILED, f"{parts.failed} of {parts.total} parts failed"
    return COMPLETED, None


def climb(
    before: Job | None,
    after: Job | None,
    get: Callable[[str], Job | None],
    roll_up: Callable[[Job, Parts | None, bool, int], Job],
    offset: int,
) -> list[Job]:
    """Carry one change of a part up to its ancestors.

    Args:
        before: the part before, None if it is new.
        after: the part after, None if it is deleted.
        get: looks a job up by id.
        roll_up: makes the parent's new state from the job, its new sums, whether a part has started, and an offset.
        offset: of the part's own entry; the ancestors' follow it.

    Returns:
        The changed ancestors, nearest first. One whose ``latest.offset`` is not above ``offset`` changed its sums only.
    """
    changed: list[Job] = []
    while True:
        part = after or before
        link = part.private.link if part is not None else None
        parent = get(link.parent_id) if link is not None else None
        if link is None or parent is None or parent.created != link.parent_created:
            return changed
        started = after is not None and after.latest.status not in (QUEUED, STALLED)
        new = roll_up(parent, moved(parent.private.parts, before, after), started, offset + 1)
        changed.append(new)
        if new.latest is parent.latest:
            return changed
        offset += 1
        before, after = parent, new
