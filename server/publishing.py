"""Batches of updates, over whatever way they come: each update is taken or refused by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from protocol.errors import ApiError
from protocol.fields import decode_fields
from server.auth import Identity
from server.brokers.base import Accepted, Publish, Submission
from server.node import Node


class Outcome(NamedTuple):
    """What became of several updates.

    Attributes:
        accepted, duplicates: how many.
        spooled: how many of the accepted ones wait for the store's return.
        rejected: the refused ones, each with its index, in order.
        last: highest offset of what was accepted, 0 if nothing was.
        cancel_requested: jobs that are asked to stop, as often as they are in it.
    """

    accepted: int
    duplicates: int
    spooled: int
    rejected: list[dict[str, Any]]
    last: int
    cancel_requested: list[str]


class Batch:
    """Several updates, handed to the broker.

    Attributes:
        submission: what was well-formed.
        next_index: index of the update that would come next.
    """

    __slots__ = ("_counters", "_indexes", "_malformed", "_source", "next_index", "submission")

    def __init__(
        self,
        node: Node,
        identity: Identity,
        items: Sequence[bytes],
        *,
        first_index: int = 0,
        key: str | None = None,
        source: str = "http",
    ) -> None:
        """Decide a batch; synchronous.

        Args:
            items: each the JSON text of one update with its ``jobId``.
            first_index: index of the first one, for batches that come in portions.
            key: idempotency key of the whole batch; each update has it with its index.
            source: the way they came, for ``Counters.updates``.
        """
        indexes: list[int] = []
        operations: list[Publish] = []
        rejected: list[tuple[int, str, str, str | None]] = []
        user, item_key = identity.user, None
        for index, item in enumerate(items, first_index):
            try:
                fields = decode_fields(item)
            except ApiError as error:
                # Not the error itself: with its traceback it is ten times as large as the line, and there may be many.
                rejected.append((index, error.code, error.message, error.field))
                continue
            indexes.append(index)
            if key is not None:
                item_key = f"{key}#{index}"
            operations.append(Publish(None, fields, "may", user, item_key))
        self.submission: Submission = node.broker.submit(operations)
        self.next_index = first_index + len(items)
        self._counters = node.counters
        self._source = source
        self._indexes = indexes
        self._malformed = rejected

    def outcome(self) -> Outcome:
        """What became of it, counted; to be asked once, and only once ``submission`` is kept."""
        accepted = duplicates = spooled = last = 0
        rejected = self._malformed
        cancels: list[str] = []
        for index, result in zip(self._indexes, self.submission.results, strict=True):
            if isinstance(result, Accepted):
                if result.duplicate:
                    duplicates += 1
                else:
                    accepted += 1
                    spooled += result.spooled != ""
                if result.offset > last:
                    last = result.offset
                if result.cancel_requested and result.job is not None:
                    cancels.append(result.job.latest.job_id)
            else:
                rejected.append((index, result.code, result.message, result.field))
        self._counters.publishes(self._source, accepted, duplicates, len(rejected))
        refusals: list[dict[str, Any]] = []
        if rejected:
            rejected.sort(key=lambda refusal: refusal[0])
            refusals = [
                {"index": index, "code": code, "message": message} | ({} if field is None else {"field": field})
                for index, code, message, field in rejected
            ]
        return Outcome(accepted, duplicates, spooled, refusals, last, cancels)


def summary(batches: Sequence[Batch], node: Node) -> dict[str, Any]:
    """``{"accepted","duplicates","rejected","id","cancelRequested"?}`` over the portions of one batch, once kept.

    With ``"spooled": true`` some of the accepted ones wait here for the store's return, and may be refused then.
    """
    accepted = duplicates = spooled = last = 0
    rejected: list[dict[str, Any]] = []
    cancels: dict[str, None] = {}
    for batch in batches:
        outcome = batch.outcome()
        accepted += outcome.accepted
        duplicates += outcome.duplicates
        spooled += outcome.spooled
        rejected += outcome.rejected
        if outcome.last > last:
            last = outcome.last
        if outcome.cancel_requested:
            cancels |= dict.fromkeys(outcome.cancel_requested)
    answer: dict[str, Any] = {
        "accepted": accepted,
        "duplicates": duplicates,
        "rejected": rejected,
        "id": f"{node.broker.epoch}:{last or node.history.last}",
    }
    if spooled:
        answer["spooled"] = True
    if cancels:
        answer["cancelRequested"] = list(cancels)
    return answer
