"""Idempotency keys: what was accepted under which key, so that a publisher may send anything twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec import UNSET

from protocol.errors import ApiError
from protocol.fields import Fields
from protocol.notice import Notice

KEEP_MS: Final = 10 * 60_000  # promised are five minutes; the rest covers slow retries and clocks that step
_PROMISED_MS: Final = 5 * 60_000
# 290 bytes each (tracemalloc, CPython 3.11), so some 290 MB at worst. Beyond it the oldest go, but none within the
# promised time: then publishes with keys are refused (3,300 new keys a second, for five minutes on end, reach that).
MAX_KEYS: Final = 1_000_000

_encode = msgspec.json.Encoder().encode


class Kept(msgspec.Struct, frozen=True, gc=False):
    """The first answer under a key.

    Attributes:
        digest: of publisher and key.
        fingerprint: of what was published.
        job_id: the job it went to, "" without one.
        offset: where it stands in the log.
        version: the job's version after it.
        at_ms: when, unix milliseconds.
    """

    digest: bytes
    fingerprint: bytes
    job_id: str
    offset: int
    version: int
    at_ms: int


def digest_of(sub: str, key: str) -> bytes:
    """A key within its publisher's scope, as 16 bytes."""
    # The length keeps ("a", "bc") and ("ab", "c") apart; surrogates cannot be encoded otherwise.
    return blake2b(f"{len(sub)}:{sub}{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def fingerprint_of(job_id: str | None, create: str, fields: Fields) -> bytes:
    """What a repetition must agree on: the target and every field, however the JSON was written; not the key itself."""
    if fields.event_id is not UNSET:
        fields = msgspec.structs.replace(fields, event_id=UNSET)
    return blake2b(f"{create} {job_id or ''}\n".encode() + _encode(fields), digest_size=16).digest()


def fingerprint_of_notice(notice: Notice) -> bytes:
    """The same for a notification."""
    return blake2b(b"notification\n" + notice.signature, digest_size=16).digest()


class Keys:
    """The table of keys, bounded by age and number."""

    def __init__(self, *, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._kept: dict[bytes, Kept] = {}
        self._by_age: deque[Kept] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, digest: bytes, now_ms: int) -> Kept | None:
        """The first answer under this key, if it is still remembered."""
        kept = self._kept.get(digest)
        return kept if kept is not None and kept.at_ms > now_ms - KEEP_MS else None

    def make_room(self, now_ms: int) -> None:
        """Before a new key. Raises ApiError 503 ``overloaded`` when the table is full of keys that must be kept."""
        self.prune(now_ms)
        if len(self._kept) >= self._max_keys:
            self._drop_until(now_ms - _PROMISED_MS, 1)
            if len(self._kept) >= self._max_keys:
                raise ApiError(503, "overloaded", "too many idempotency keys within five minutes", retry_after=30)

    def add(self, kept: Kept) -> None:
        """Remember an answer."""
        self._kept[kept.digest] = kept
        self._by_age.append(kept)

    def remove(self, keys: Iterable[Kept]) -> None:
        """Take back keys that were just added, because their updates were not kept."""
        gone = set()
        for kept in keys:
            if self._kept.get(kept.digest) is kept:
                del self._kept[kept.digest]
            gone.add(kept.digest)
        while self._by_age and self._by_age[-1].digest in gone:
            self._by_age.pop()

    def prune(self, now_ms: int) -> None:
        """Forget what is too old."""
        self._drop_until(now_ms - KEEP_MS, len(self._by_age))

    def load(self, keys: Iterable[Kept]) -> None:
        """Start from these, oldest first."""
        self._kept.clear()
        self._by_age.clear()
        for kept in keys:
            self.add(kept)

    def _drop_until(self, at_ms: int, most: int) -> None:
        while most and self._by_age and self._by_age[0].at_ms <= at_ms:
            kept = self._by_age.popleft()
            if self._kept.get(kept.digest) is kept:
                del self._kept[kept.digest]
            most -= 1
