"""Batches of updates, over whatever way they come: each update is taken or refused by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import trio
from msgspec.json import encode

from protocol.errors import ApiError
from protocol.fields import decode_fields
from protocol.messages import Ref, server_message
from server.auth import Identity
from server.brokers.base import Accepted, Publish, Submission
from server.node import Node

# A batch is decided in portions of this many updates, so that a large one (some 5 µs an update) holds up nobody.
PORTION: Final = 200
# Those of one batch. What is refused costs us some 500 bytes of answer, and must not be many times the batch.
MAX_UPDATES: Final = 100_000
# What is known of an update until its batch is answered, in bytes.
HELD_PER_UPDATE: Final = 512
# A disk that has not taken it by then may never; it is not known then whether it will.
PATIENCE_S: Final = 60.0


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
    """Several updates, read; ``submit`` hands them to the broker.

    Attributes:
        operations: what was well-formed.
        submission: what became of it, perhaps among others.
        next_index: index of the update that would come next.
    """

    __slots__ = (
        "_at",
        "_counters",
        "_indexes",
        "_malformed",
        "_outcome",
        "_source",
        "next_index",
        "operations",
        "submission",
    )

    submission: Submission

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
        """Read a batch.

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
        self.operations = operations
        self._at = 0  # where its results begin among those of the submission
        self.next_index = first_index + len(items)
        self._counters = node.counters
        self._source = source
        self._indexes = indexes
        self._malformed = rejected
        self._outcome: Outcome | None = None

    def submitted(self, submission: Submission, at: int) -> None:
        """Its results are there, from this one on."""
        self.submission, self._at = submission, at

    def plainly(self) -> int:
        """The offset of a batch of one update that was accepted, with nothing else to say of it; else 0.

        To be asked once, in place of ``outcome`` unless it is 0.
        """
        if len(self._indexes) != 1 or self._malformed:
            return 0
        result = self.submission.results[self._at]
        if not isinstance(result, Accepted) or result.duplicate or result.spooled or result.cancel_requested:
            return 0
        self._counters.publishes(self._source, 1, 0, 0)
        return result.offset

    def settled(self, error: ApiError | None) -> None:
        """Count what became of it: it is kept, or with an error nothing of it is."""
        if error is None:
            self.outcome()
        else:
            self._counters.publishes(self._source, 0, 0, len(self._indexes) + len(self._malformed))

    def outcome(self) -> Outcome:
        """What became of it, once ``submission`` is kept; counted when it is first asked for."""
        if self._outcome is None:
            self._outcome = self._settle()
        return self._outcome

    def _settle(self) -> Outcome:
        results = self.submission.results
        if len(results) != len(self._indexes):  # there are others' among them
            results = results[self._at : self._at + len(self._indexes)]
        accepted = duplicates = spooled = last = 0
        rejected = self._malformed
        cancels: list[str] = []
        for index, result in zip(self._indexes, results, strict=True):
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


def check_count(count: int) -> None:
    """Raise ApiError 413 for more updates than a batch may have."""
    if count > MAX_UPDATES:
        raise ApiError(413, "payload_too_large", f"a batch may have {MAX_UPDATES} updates: send it in parts")


async def take_in(
    node: Node, identity: Identity, batches: list[Batch], items: Sequence[bytes], *, key: str | None, source: str
) -> None:
    """Decide some more updates of a batch, at most ``PORTION``, when others have had their turn. They are counted as
    soon as they are kept: the last may come hours later."""
    if batches:
        await trio.lowlevel.checkpoint()
    await node.hub.wait_room()
    first = batches[-1].next_index if batches else 0
    batch = Batch(node, identity, items, first_index=first, key=key, source=source)
    submit(node, [batch]).when_kept(batch.settled)
    batches.append(batch)


def check_kept(submission: Submission) -> None:
    """Raise ApiError 503 if it was lost, or if nobody knows by now."""
    if not submission.settled:
        raise in_doubt()
    submission.check()


async def wait_kept(submission: Submission) -> None:
    """Wait until it is kept.

    Raises:
        ApiError: 503 if it was lost, or if nobody knows after ``PATIENCE_S`` seconds.
    """
    if submission.kept:
        return
    with trio.move_on_after(PATIENCE_S):
        await submission.wait_kept()
        return
    raise in_doubt()


def in_doubt() -> ApiError:
    """503: it is not known whether it is kept, nor whether it will be."""
    message = f"the store has not said within {PATIENCE_S:g} s whether this is kept; send it again with its key"
    return ApiError(503, "store_unavailable", message, retry_after=5)


def submit(node: Node, batches: Sequence[Batch]) -> Submission:
    """Decide batches in order, now and together; synchronous."""
    if len(batches) == 1:
        operations = batches[0].operations
    else:
        operations = [operation for batch in batches for operation in batch.operations]
    submission = node.broker.submit(operations)
    at = 0
    for batch in batches:
        batch.submitted(submission, at)
        at += len(batch.operations)
    return submission


def published(batch: Batch, node: Node, ref: Ref) -> bytes:
    """The message ``published`` for one batch, once kept."""
    offset = batch.plainly()
    if offset:  # by far the most frequent answer, for a fifth of the time
        said = b"" if ref is None else b'"ref":%b,' % encode(ref)
        return b'{"type":"published",%b"accepted":1,"duplicates":0,"rejected":[],"id":"%b:%d"}' % (
            said,
            node.broker.epoch.encode(),
            offset,
        )
    return server_message("published", ref=ref, **summary([batch], node))


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
