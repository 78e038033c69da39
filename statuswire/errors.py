"""What this package raises: little, because a worker is not to fail over news of itself."""

from __future__ import annotations


class StatuswireError(Exception):
    """Base of everything here."""


class JobCancelled(StatuswireError):
    """Somebody asked for the job to be cancelled. Raised by ``progress()`` with ``raise_on_cancel=True`` only."""


class Rejected(StatuswireError):
    """The server does not take this, and would not the next time. Raised with ``strict=True`` only.

    Attributes:
        code: of the contract, such as ``job_ended`` or ``invalid_field``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code


class Unavailable(StatuswireError):
    """There was no answer in time; what must not be lost is still being tried. Raised with ``strict=True`` only."""
