"""Batches of updates, over whatever way they come: each update is taken or refused by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocol.errors import ApiError
from protocol.fields import decode_fields
from server.auth import Identity
from server.brokers.base import Accepted, Publish, Submission
from server.node import Node


class Batch:
    """The outcome of several updates; show it only once ``submission`` is kept.

    Attributes:
        submission: what was well-formed, as handed to the broker.
        accepted, duplicates: how many.
        rejected: the refused ones, each with its index, in order.
        next_index: index of the update that would come next.
        last: highest offset of what was accepted, 0 if nothing was.
        cancel_requested: jobs that are asked to stop, each once.
    """

    __slots__ = ("accepted", "cancel_requested", "duplicates", "last", "next_index", "rejected", "submission")

    def __init__(
        self, node: Node, identity: Identity, items: Sequence[bytes], *, first_index: int = 0, key: str | None = None
    ) -> None:
        """Decide a batch; synchronous.

        Args:
            items: each the JSON text of one update with its ``jobId``.
            first_index: index of the first one, for batches that come in portions.
            key: idempotency key of the whole batch; each update has it with its index.
        """
        indexes: list[int] = []
        operations: list[Publish] = []
        rejected: list[tuple[int, ApiError]] = []
        for index, item in enumerate(items, first_index):
            try:
                fields = decode_fields(item)
            except ApiError as error:
                rejected.append((index, error))
                continue
            indexes.append(index)
            item_key = None if key is None else f"{key}#{index}"
            operations.append(Publish(None, fields, "may", identity.user, item_key))
        self.submission: Submission = node.broker.submit(operations)
        self.next_index = first_index + len(items)
        self.accepted = self.duplicates = self.last = 0
        cancels: dict[str, None] = {}
        for index, result in zip(indexes, self.submission.results, strict=True):
            if isinstance(result, Accepted):
                if result.duplicate:
                    self.duplicates += 1
                else:
                    self.accepted += 1
                self.last = max(self.last, result.offset)
                if result.cancel_requested and result.job is not None:
                    cancels[result.job.latest.job_id] = None
            else:
                rejected.append((index, result))
        rejected.sort(key=lambda refusal: refusal[0])
        self.rejected = [
            {"index": index, "code": error.code, "message": error.message}
            | ({} if error.field is None else {"field": error.field})
            for index, error in rejected
        ]
        self.cancel_requested = list(cancels)


def summary(batches: Sequence[Batch], node: Node) -> dict[str, Any]:
    """``{"accepted","duplicates","rejected","id","cancelRequested"?}`` over the portions of one batch."""
    last = max((batch.last for batch in batches), default=0) or node.history.last
    answer: dict[str, Any] = {
        "accepted": sum(batch.accepted for batch in batches),
        "duplicates": sum(batch.duplicates for batch in batches),
        "rejected": [refusal for batch in batches for refusal in batch.rejected],
        "id": f"{node.broker.epoch}:{last}",
    }
    if cancels := list(dict.fromkeys(job_id for batch in batches for job_id in batch.cancel_requested)):
        answer["cancelRequested"] = cancels
    return answer
