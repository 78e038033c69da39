"""The table of idempotency keys."""

from __future__ import annotations

import pytest

from protocol.errors import ApiError
from server.brokers.keys import KEEP_MS, Kept, Keys, digest_of, fingerprint_of
from tests.contract.harness import fields

MINUTE = 60_000


def kept(name: str, at_ms: int = 0) -> Kept:
    return Kept(digest_of("sub", name), b"f", "job", 1, 1, at_ms)


def test_scope_and_key_do_not_run_into_each_other() -> None:
    assert digest_of("ab", "c") != digest_of("a", "bc")
    assert digest_of("a", "\ud800") != digest_of("a", "x")


def test_the_fingerprint_is_of_the_meaning() -> None:
    base = fingerprint_of("a", "may", fields(progress=5, stage="s"))
    assert fingerprint_of("a", "may", fields(stage="s", progress=5.0)) == base
    assert fingerprint_of("a", "may", fields(stage="s", progress=5, eventId="e")) == base
    assert fingerprint_of("b", "may", fields(progress=5, stage="s")) != base
    assert fingerprint_of("a", "must", fields(progress=5, stage="s")) != base
    assert fingerprint_of("a", "may", fields(progress=5, stage=None)) != base
    assert fingerprint_of("a", "may", fields(progress=5)) != fingerprint_of("a", "may", fields(progress=5, stage=None))


def test_found_until_it_is_too_old() -> None:
    keys = Keys()
    keys.add(kept("k", 1000))
    assert keys.find(digest_of("sub", "k"), 1000 + KEEP_MS - 1) is not None
    assert keys.find(digest_of("sub", "k"), 1000 + KEEP_MS) is None
    keys.prune(1000 + KEEP_MS)
    assert len(keys) == 0


def test_a_full_table_drops_old_keys_but_none_within_the_promise() -> None:
    keys = Keys(max_keys=2)
    keys.add(kept("a", 0))
    keys.add(kept("b", 4 * MINUTE))
    with pytest.raises(ApiError) as caught:
        keys.make_room(5 * MINUTE - 1)
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    keys.make_room(5 * MINUTE)
    assert keys.find(digest_of("sub", "a"), 5 * MINUTE) is None
    assert keys.find(digest_of("sub", "b"), 5 * MINUTE) is not None


def test_what_was_not_kept_is_taken_back() -> None:
    keys = Keys()
    old, lost = kept("old"), [kept("x", 5), kept("y", 6)]
    for each in (old, *lost):
        keys.add(each)
    keys.remove(lost)
    assert (len(keys), len(keys._by_age)) == (1, 1)
    assert keys.find(old.digest, 10) is old


def test_an_expired_key_used_again_is_the_new_one() -> None:
    keys = Keys()
    keys.add(kept("k", 0))
    again = kept("k", KEEP_MS + 5)
    keys.add(again)
    keys.prune(KEEP_MS + 5)
    assert keys.find(again.digest, KEEP_MS + 5) is again
