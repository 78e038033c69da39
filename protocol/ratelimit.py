"""A token bucket: so much per second in the long run, so much at once; and a share of one that is kept elsewhere.

No clock of their own.
"""

from __future__ import annotations

from math import inf

_ROUNDING = 1e-3
"""Tokens forgiven to float rounding, so that waiting exactly as long as told is always enough.

Nothing leaks: what was forgiven stays in the bucket as debt.
"""


class TokenBucket:
    """Starts full with ``burst`` tokens and regains ``rate`` tokens per second, up to ``burst``.

    Both attributes may be set later (a configuration that is read again). About 0.2 µs per ``take``.
    """

    __slots__ = ("_at", "_tokens", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        """
        Args:
            rate: tokens per second, above 0.
            burst: most tokens that can be saved up, at least 1.

        Raises:
            ValueError: values outside these ranges.
        """
        if not 0 < rate < inf:
            raise ValueError(f"rate={rate}: must be a number above 0")
        if not 1 <= burst < inf:
            raise ValueError(f"burst={burst}: must be a number of at least 1")
        self.rate = rate
        self.burst = burst
        self._tokens = float(burst)
        self._at = -inf

    def take(self, now: float, n: float = 1) -> float:
        """Take ``n`` tokens.

        A batch larger than ``burst`` is allowed on a full bucket and leaves it in debt: it passes, and the
        rate still holds in the long run.

        Args:
            now: monotonic seconds. A clock that steps back refills nothing for the time it repeats.
            n: tokens, 0 or more.

        Returns:
            0.0 if they were taken; else the seconds after which they can be, and nothing was taken.
        """
        tokens = self._refill(now)
        missing = (n if n < self.burst else self.burst) - tokens
        if missing <= _ROUNDING:
            self._tokens = tokens - n
            return 0.0
        return missing / self.rate

    def full(self, now: float) -> bool:
        """Whether this bucket is as good as new, so that a table may forget it."""
        return self._refill(now) >= self.burst

    def _refill(self, now: float) -> float:
        tokens = self._tokens
        elapsed = now - self._at
        if elapsed > 0:
            tokens += elapsed * self.rate
        if tokens > self.burst:
            tokens = self.burst
        self._tokens = tokens
        self._at = now
        return tokens


SHARE_S = 1.0
"""Seconds for which tokens that were fetched may be spent: who pauses longer starts from the common bucket again."""


class Share:
    """Tokens of a bucket that several have in common, fetched in blocks and spent here without asking."""

    __slots__ = ("_refused_until", "_tokens", "_until")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._until = -inf
        self._refused_until = -inf

    def take(self, now: float, n: float = 1) -> float | None:
        """Take ``n`` tokens of those that are here.

        Returns:
            0.0 if they were taken; the seconds after which to ask again, if the bucket has said so; None if more have
            to be fetched.
        """
        if now >= self._until:
            self._tokens = 0.0
        if self._tokens >= n:
            self._tokens -= n
            return 0.0
        return self._refused_until - now if now < self._refused_until else None

    def put(self, now: float, granted: float) -> None:
        """The bucket gave so many."""
        self._tokens = granted + (self._tokens if now < self._until else 0.0)
        self._until = now + SHARE_S
        self._refused_until = -inf

    def refuse(self, now: float, wait: float) -> None:
        """The bucket has too few, for so many seconds."""
        self._refused_until = now + wait

    def idle(self, now: float) -> bool:
        """Whether there is nothing here to remember."""
        return now >= self._until and now >= self._refused_until
