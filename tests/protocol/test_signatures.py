from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.signatures import MAX_SKEW_S, check_signature, sign

SECRET = "a secret that is shared"
NOW = 1_750_000_000


def refused(timestamp: str | None, signature: str | None, body: bytes = b"{}", now: float = NOW) -> str:
    with pytest.raises(ApiError) as caught:
        check_signature(SECRET, timestamp, signature, body, now)
    assert (caught.value.status, caught.value.code) == (401, "bad_signature")
    return caught.value.message


def test_the_signature_is_an_hmac_of_timestamp_and_body() -> None:
    expected = hmac.new(SECRET.encode(), b'1750000000.{"a":1}', hashlib.sha256).hexdigest()
    assert sign(SECRET, NOW, b'{"a":1}') == f"sha256={expected}"


@given(st.binary(max_size=200), st.integers(-MAX_SKEW_S, MAX_SKEW_S))
def test_what_is_signed_is_accepted_while_it_is_fresh(body: bytes, skew: int) -> None:
    signature = sign(SECRET, NOW, body)
    assert check_signature(SECRET, str(NOW), signature, body, NOW + skew) == signature.removeprefix("sha256=")
    assert check_signature(SECRET, str(NOW), signature.upper().replace("SHA", "sha"), body, NOW) in signature


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_another_body_is_refused(body: bytes, other: bytes) -> None:
    if body != other:
        assert "does not fit" in refused(str(NOW), sign(SECRET, NOW, body), other)


@pytest.mark.parametrize("seconds", [MAX_SKEW_S + 1, -MAX_SKEW_S - 1, NOW])
def test_a_stale_timestamp_is_refused(seconds: int) -> None:
    assert "seconds from this server's time" in refused(str(NOW - seconds), sign(SECRET, NOW - seconds, b"{}"))


@pytest.mark.parametrize(
    ("timestamp", "signature"),
    [
        (None, sign(SECRET, NOW, b"{}")),
        (str(NOW), None),
        ("", sign(SECRET, NOW, b"{}")),
        (f"{NOW}.5", sign(SECRET, NOW, b"{}")),
        (f"-{NOW}", sign(SECRET, NOW, b"{}")),
        ("9" * 400, sign(SECRET, NOW, b"{}")),
        ("\u0661", sign(SECRET, NOW, b"{}")),
        (f"0{NOW}", sign(SECRET, NOW, b"{}")),  # the same time, but not the same text
        (str(NOW), ""),
        (str(NOW), sign(SECRET, NOW, b"{}").removeprefix("sha256=")),
        (str(NOW), sign(SECRET, NOW, b"{}")[:-2]),
        (str(NOW), sign(SECRET, NOW, b"{}") + "00"),
        (str(NOW), "sha256=" + "g" * 64),
        (str(NOW), "sha1=" + "0" * 64),
        (str(NOW), sign(SECRET + "x", NOW, b"{}")),
        (str(NOW), sign(SECRET, NOW + 1, b"{}")),
    ],
)
def test_anything_else_is_refused(timestamp: str | None, signature: str | None) -> None:
    refused(timestamp, signature)
