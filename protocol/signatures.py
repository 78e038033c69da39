"""Signed bodies, as both webhooks and callbacks have them.

``X-Timestamp`` is the time of sending in unix seconds, ``X-Signature-256`` is ``sha256=`` and the hexadecimal
HMAC-SHA256 (RFC 2104) of ``<timestamp>.<body>`` under the shared secret: a body that is caught cannot be sent again
much later, and none can be made up.
"""

from __future__ import annotations

import hmac
import re
from typing import Final

from protocol.errors import ApiError

# How far the clocks of both sides may be apart; beyond it a signature is stale.
MAX_SKEW_S: Final = 300

_SIGNATURE = re.compile(r"sha256=([0-9a-f]{64})", re.IGNORECASE)
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def sign(secret: str, timestamp: int, body: bytes) -> str:
    """The value of ``X-Signature-256`` for a body sent at this time (unix seconds)."""
    return "sha256=" + hmac.digest(secret.encode(), b"%d.%b" % (timestamp, body), "sha256").hex()


def check_signature(secret: str, timestamp: str | None, signature: str | None, body: bytes, now: float) -> str:
    """Check a body's signature.

    Args:
        timestamp: the value of ``X-Timestamp``.
        signature: the value of ``X-Signature-256``.
        now: unix seconds.

    Returns:
        The signature in its one spelling: names this body at this time.

    Raises:
        ApiError: 401 ``bad_signature``, saying what is wrong as far as that is no help in guessing.
    """
    timestamp, claimed = check_signed_headers(timestamp, signature, now)
    # The timestamp as it was sent, not as it reads: what is signed is text.
    expected = hmac.digest(secret.encode(), timestamp.encode() + b"." + body, "sha256")
    if not hmac.compare_digest(expected, bytes.fromhex(claimed)):
        raise _bad("the signature does not fit the body, the timestamp and the secret")
    return claimed


def check_signed_headers(timestamp: str | None, signature: str | None, now: float) -> tuple[str, str]:
    """Check what can be checked before there is a body; see ``check_signature``.

    Returns:
        The timestamp as it was sent, and the signature it claims: 64 lower-case hexadecimal digits.

    Raises:
        ApiError: 401 ``bad_signature``.
    """
    if timestamp is None or signature is None:
        raise _bad("X-Timestamp and X-Signature-256 are needed")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise _bad("X-Timestamp must be a whole number of unix seconds")
    if abs(now - int(timestamp)) > MAX_SKEW_S:
        raise _bad(f"X-Timestamp is more than {MAX_SKEW_S} seconds from this server's time")
    match = _SIGNATURE.fullmatch(signature)
    if match is None:
        raise _bad("X-Signature-256 must be 'sha256=' and 64 hexadecimal digits")
    return timestamp, match[1].lower()


def _bad(message: str) -> ApiError:
    return ApiError(401, "bad_signature", message)
