from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.request import Request
from server import config, limits
from server.config import ConfigError
from server.limits import Limits, Rates, TrustedProxies, client_address, parse_proxies


def refused(error: ApiError) -> tuple[int, str, int | None]:
    return error.status, error.code, error.retry_after


def test_a_user_with_as_many_connections_as_allowed_gets_no_more() -> None:
    table = Limits(config.Limits(connections_per_user=2))
    table.check_connections(1)
    with pytest.raises(ApiError) as caught:
        table.check_connections(2)
    assert refused(caught.value) == (429, "rate_limited", limits.CONNECTION_RETRY)
    table.reload(config.Limits(connections_per_user=3))
    table.check_connections(2)


async def test_no_limit_keeps_no_table() -> None:
    table = Limits(config.Limits())
    table.check_connections(1_000_000)
    for _ in range(100):
        table.check_connect("192.0.2.1", 0.0)
        await table.check_message("ann", 0.0)
        await table.check_publish("ann", 0.0, 1000)
    assert table.entries == 0


def test_an_address_has_so_many_places() -> None:
    table = Limits(config.Limits(connections_per_address=2))
    places = [table.enter("192.0.2.1"), table.enter("192.0.2.1")]
    with pytest.raises(ApiError, match="open from your address") as caught:
        table.enter("192.0.2.1")
    assert refused(caught.value) == (429, "rate_limited", limits.CONNECTION_RETRY)
    other = table.enter("192.0.2.2")
    table.leave(places.pop())
    places.append(table.enter("192.0.2.1"))
    for place in (*places, other):
        table.leave(place)
    assert table.entries == 0


def test_places_that_were_taken_under_other_limits_are_given_back() -> None:
    table = Limits(config.Limits())
    uncounted = table.enter("192.0.2.1")
    table.reload(config.Limits(connections_per_address=1))
    counted = table.enter("192.0.2.1")
    table.leave(uncounted)
    with pytest.raises(ApiError):
        table.enter("192.0.2.1")
    table.reload(config.Limits())
    table.leave(counted)
    assert table.entries == 0


def test_large_bodies_share_a_bound_and_small_ones_are_free() -> None:
    table = Limits(config.Limits(unfinished=1000))
    free = limits.UNFINISHED_FREE
    table.hold(0, free)
    table.hold(free, free + 600)
    with pytest.raises(ApiError) as caught:
        table.hold(0, free + 401)
    assert refused(caught.value) == (503, "try_later", 1)
    table.hold(0, free + 400)
    table.hold(0, free)
    table.hold(free + 400, 0)
    table.hold(free + 600, 0)
    assert table.unfinished == 0


async def test_each_rate_is_apart_and_per_key() -> None:
    table = Limits(config.Limits(connects_per_second=1, messages_per_second=2, publishes_per_second=3))
    table.check_connect("192.0.2.1", 0.0)
    with pytest.raises(ApiError, match="at most 1 per second"):
        table.check_connect("192.0.2.1", 0.0)
    table.check_connect("192.0.2.2", 0.0)
    for _ in range(2):
        await table.check_message("ann", 0.0)
    with pytest.raises(ApiError) as caught:
        await table.check_message("ann", 0.0)
    assert refused(caught.value) == (429, "rate_limited", 1)
    await table.check_message("bob", 0.0)
    await table.check_publish("ann", 0.0, 3)
    with pytest.raises(ApiError):
        await table.check_publish("ann", 0.0)
    await table.check_publish("ann", 1.0, 3)


async def test_retry_after_is_whole_seconds_that_suffice() -> None:
    table = Limits(config.Limits(publishes_per_second=0.4))
    await table.check_publish("ann", 0.0)
    with pytest.raises(ApiError) as caught:
        await table.check_publish("ann", 0.0)
    assert caught.value.retry_after == 3
    await table.check_publish("ann", 3.0)


async def test_a_large_batch_passes_and_is_paid_off() -> None:
    table = Limits(config.Limits(publishes_per_second=10))
    await table.check_publish("ann", 0.0, 100)
    with pytest.raises(ApiError) as caught:
        await table.check_publish("ann", 1.0)
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 8
    await table.check_publish("ann", 11.0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::9", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("unix", "unix", True),
        ("no:address", "no:other", False),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    table = Limits(config.Limits(connects_per_second=1))
    table.check_connect(one, 0.0)
    if same:
        with pytest.raises(ApiError, match="your address"):
            table.check_connect(other, 0.0)
    else:
        table.check_connect(other, 0.0)


async def test_the_quiet_are_forgotten() -> None:
    table = Limits(config.Limits(messages_per_second=5, publishes_per_second=5, connects_per_second=5))
    for number in range(100):
        await table.check_message(f"user{number}", 0.0)
    assert table.entries == 100
    await table.check_message("late", 1.0)  # in passing
    assert table.entries == 1
    await table.check_publish("late", 1.0)
    table.sweep(1.05)
    assert table.entries == 2
    table.sweep(2.0)
    assert table.entries == 0


def test_forgetting_gives_no_tokens_away() -> None:
    rates = Rates(1.0, "messages")
    rates.take("ann", 0.0, 10)
    for number in range(50):
        rates.take(f"user{number}", 5.0, 1)
    with pytest.raises(ApiError):
        rates.take("ann", 9.0, 1)
    rates.take("ann", 10.0, 1)


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BUCKETS", 10)
    rates = Rates(1.0, "messages")
    for number in range(10):
        rates.take(f"user{number}", 0.0, 1)
    with pytest.raises(ApiError):
        rates.take("user0", 0.0, 1)  # used again, so user1 is the longest unused
    rates.take("user10", 0.0, 1)
    assert len(rates) == 10
    with pytest.raises(ApiError):
        rates.take("user0", 0.0, 1)
    rates.take("user1", 0.0, 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 2), st.integers(1, 5)), max_size=60))
def test_nobody_gets_more_than_the_rate(steps: list[tuple[int, float, int]]) -> None:
    rates = Rates(2.0, "messages")
    taken = dict.fromkeys(range(4), 0)
    now = 0.0
    for user, pause, n in steps:
        now += pause
        try:
            rates.take(str(user), now, n)
        except ApiError:
            continue
        # Before a batch passes, what was taken earlier had been paid down to at most the burst.
        assert taken[user] + min(n, 2) <= 2 + 2.0 * now + 0.1
        taken[user] += n


# --- where a request came from ---


def ask(forwarded: str | None = None) -> Request:
    return Request("GET", "/", "/", {}, {} if forwarded is None else {"x-forwarded-for": forwarded})


PROXIES = parse_proxies(["10.0.0.0/8", "::1", "2001:db8::/32", "unix"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.1", None, "192.0.2.1"),
        ("192.0.2.1", "198.51.100.7", "192.0.2.1"),  # anyone can write the header
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7, 10.1.1.1,10.2.2.2", "198.51.100.7"),
        ("10.0.0.1", "10.1.1.1, 10.2.2.2", "10.1.1.1"),
        ("10.0.0.1", "203.0.113.9, unknown", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.9, unknown, 10.3.3.3", "10.3.3.3"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7,", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", "[2001:db9::5]:4711", "2001:db9::5"),
        ("10.0.0.1", "2001:DB9:0::5", "2001:db9::5"),
        ("10.0.0.1", "<script>", "10.0.0.1"),
        ("10.0.0.1", "010.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("::ffff:192.0.2.1", "198.51.100.7", "192.0.2.1"),
        ("::1", "::ffff:198.51.100.7", "198.51.100.7"),
        ("fe80::1%eth0", "198.51.100.7", "fe80::1"),
        ("unix", "198.51.100.7", "198.51.100.7"),
        ("", "198.51.100.7", "198.51.100.7"),
        ("unix", None, "unix"),
        ("strange", "198.51.100.7", "strange"),
    ],
)
def test_client_address(peer: str, forwarded: str | None, client: str) -> None:
    assert client_address(peer, ask(forwarded), PROXIES) == client


def test_nobody_is_trusted_by_default() -> None:
    nobody = parse_proxies([])
    assert nobody == TrustedProxies()
    for peer in ("127.0.0.1", "::1", "unix", ""):
        assert not nobody.trusts(peer)
        assert client_address(peer, ask("198.51.100.7"), nobody) in ("127.0.0.1", "::1", "unix")


def test_trusts() -> None:
    assert PROXIES.trusts("10.1.2.3")
    assert PROXIES.trusts("::ffff:10.1.2.3")
    assert PROXIES.trusts("unix")
    assert not PROXIES.trusts("11.1.2.3")
    assert not PROXIES.trusts("strange")


def test_the_walk_is_bounded() -> None:
    endless = "203.0.113.9," + ",".join(["10.0.0.1"] * 5000)
    assert client_address("10.0.0.9", ask(endless), PROXIES) == "10.0.0.1"


@given(st.text(max_size=80))
def test_the_header_never_breaks_anything(forwarded: str) -> None:
    assert client_address("10.0.0.1", ask(forwarded + ", ???"), PROXIES) == "10.0.0.1"
    client_address("10.0.0.1", ask(forwarded), PROXIES)


@pytest.mark.parametrize("entry", ["*", "10.0.0.0/99", "proxy.example", ""])
def test_a_bad_proxy_is_refused_by_name(entry: str) -> None:
    with pytest.raises(ConfigError, match="trusted_proxies"):
        parse_proxies([entry])


def test_a_network_may_be_written_by_any_of_its_addresses() -> None:
    assert parse_proxies(["10.1.2.3/8"]).trusts("10.9.9.9")
