from __future__ import annotations

import pytest

from protocol.errors import ApiError
from protocol.request import Request
from server.config import ConfigError
from server.origins import (
    ALLOWED_HEADERS,
    check_host,
    check_origin,
    cors_headers,
    is_preflight,
    origin_allowed,
    parse_origins,
    preflight_headers,
)

NONE: frozenset[str] = frozenset()
LISTED = frozenset({"https://app.example.com", "http://localhost:5173"})


def ask(method: str = "GET", **headers: str) -> Request:
    return Request(method, "/", "/", {}, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:3000",
        "localhost.:3000",
        "app.localhost",
        "127.0.0.1",
        "127.0.0.1:3000",
        "127.8.9.10:1",
        "[::1]",
        "[::1]:3000",
        "[0:0:0:0:0:0:0:1]:80",
    ],
)
def test_open_mode_answers_to_loopback(host: str) -> None:
    check_host(ask(host=host), open_mode=True)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:3000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "notlocalhost",
        "0.0.0.0:3000",
        "127.1",
        "2130706433",
        "0177.0.0.1",
        "[::]:3000",
        "[::2]",
        "[::1",
        "::1",
        "192.168.0.1",
        "",
        "localhost:80:80",
        "localhost, evil.example",
        "user@localhost",
    ],
)
def test_open_mode_refuses_any_other_host(host: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_host(ask(host=host), open_mode=True)
    assert (caught.value.status, caught.value.code) == (403, "host_not_allowed")


def test_host_is_free_with_authentication_and_may_be_missing_in_http_1_0() -> None:
    check_host(ask(host="app.example.com"), open_mode=False)
    check_host(ask(), open_mode=True)


def test_a_refused_host_is_repeated_only_in_part() -> None:
    with pytest.raises(ApiError) as caught:
        check_host(ask(host="a" * 30_000), open_mode=True)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://h.example", "h.example", True),
        ("http://h.example", "h.example:80", True),
        ("https://h.example", "h.example:443", True),
        ("https://h.example", "h.example", True),  # TLS ended at a proxy
        ("https://H.example", "h.EXAMPLE", True),
        ("http://h.example:80", "h.example", True),
        ("http://h.example:3000", "h.example:3000", True),
        ("http://[::1]:3000", "[::1]:3000", True),
        ("http://h.example:3000", "h.example", False),
        ("http://h.example", "h.example:3000", False),
        ("http://h.example:443", "h.example", False),
        ("http://evil.example", "h.example", False),
        ("http://h.example.evil.example", "h.example", False),
        ("http://evil.example@h.example", "h.example", False),
        ("http://h.example/", "h.example", False),
        ("http://h.example, http://evil.example", "h.example", False),
        ("ftp://h.example", "h.example", False),
        ("chrome-extension://h.example", "h.example", False),
        ("null", "h.example", False),
        ("null", "null", False),
        ("", "", False),
        ("http://", "", False),
        ("http://h.example", "", False),
    ],
)
def test_same_origin(origin: str, host: str, same: bool) -> None:
    request = ask(origin=origin, host=host)
    assert origin_allowed(request, NONE) is same
    assert cors_headers(request, NONE) == []


def test_no_origin_is_no_browser() -> None:
    assert origin_allowed(ask("POST", host="h.example"), NONE)
    check_origin(ask("POST"), NONE, websocket=False)
    check_origin(ask("GET"), NONE, websocket=True)


def test_listed_origins_match_exactly() -> None:
    assert origin_allowed(ask(origin="https://app.example.com", host="api.example.com"), LISTED)
    assert origin_allowed(ask(origin="https://APP.example.com"), LISTED)
    for other in ("http://app.example.com", "https://app.example.com:8443", "https://app.example.com.evil.example"):
        assert not origin_allowed(ask(origin=other, host="api.example.com"), LISTED)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "get", "BREW"])
def test_a_foreign_page_must_not_change_anything(method: str) -> None:
    request = ask(method, origin="https://evil.example", host="h.example")
    with pytest.raises(ApiError) as caught:
        check_origin(request, LISTED, websocket=False)
    assert (caught.value.status, caught.value.code) == (403, "origin_not_allowed")
    check_origin(ask(method, origin="https://app.example.com", host="h.example"), LISTED, websocket=False)
    check_origin(ask(method, origin="https://h.example", host="h.example"), LISTED, websocket=False)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_reading_is_left_to_cors_but_a_websocket_is_not(method: str) -> None:
    request = ask(method, origin="https://evil.example", host="h.example")
    check_origin(request, LISTED, websocket=False)
    assert cors_headers(request, LISTED) == [("Vary", "Origin")]
    with pytest.raises(ApiError, match="evil"):
        check_origin(request, LISTED, websocket=True)


def test_cors_headers_of_a_listed_origin() -> None:
    headers = dict(cors_headers(ask(origin="http://localhost:5173", cookie="a=b"), LISTED))
    assert headers["Vary"] == "Origin"
    assert headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
    assert headers["Access-Control-Allow-Credentials"] == "true"
    exposed = headers["Access-Control-Expose-Headers"].split(", ")
    assert {"etag", "retry-after", "x-request-id", "x-job-status", "x-job-version", "location"} <= set(exposed)


def test_vary_is_there_without_an_origin_once_origins_are_configured() -> None:
    assert cors_headers(ask(), LISTED) == [("Vary", "Origin")]
    assert cors_headers(ask(), NONE) == []


def test_anybody_is_let_in_without_cookies_only() -> None:
    star = frozenset({"*"})
    bare, ambient = ask("POST", origin="https://a.example"), ask("POST", origin="https://a.example", cookie="x=1")
    check_origin(bare, star, websocket=False)
    headers = dict(cors_headers(bare, star))
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in headers
    assert cors_headers(ambient, star) == [("Vary", "Origin")]
    for websocket in (False, True):
        with pytest.raises(ApiError):
            check_origin(ambient, star, websocket=websocket)
    # Listed by name as well, it is trusted with cookies.
    check_origin(ambient, star | {"https://a.example"}, websocket=True)


def test_the_null_origin_needs_to_be_listed_and_gets_no_cookies() -> None:
    null = ask("POST", origin="null")
    with pytest.raises(ApiError):
        check_origin(null, LISTED, websocket=False)
    listed = frozenset({"null"})
    check_origin(null, listed, websocket=False)
    headers = dict(cors_headers(null, listed))
    assert headers["Access-Control-Allow-Origin"] == "null"
    assert "Access-Control-Allow-Credentials" not in headers
    with pytest.raises(ApiError):
        check_origin(ask("POST", origin="null", cookie="x=1"), listed, websocket=False)
    assert not origin_allowed(ask(origin="https://a.example"), listed)


def test_preflight() -> None:
    request = ask("OPTIONS", origin="https://app.example.com", access_control_request_method="DELETE")
    assert is_preflight(request)
    headers = dict(preflight_headers(request, ["GET", "DELETE"]))
    assert headers == {
        "Access-Control-Allow-Methods": "GET, DELETE",
        "Access-Control-Allow-Headers": ALLOWED_HEADERS,
        "Access-Control-Max-Age": "600",
    }
    assert set(ALLOWED_HEADERS.split(", ")) == {
        "authorization",
        "content-type",
        "idempotency-key",
        "last-event-id",
        "if-none-match",
    }


@pytest.mark.parametrize(
    "request_",
    [
        ask("OPTIONS"),
        ask("OPTIONS", origin="https://app.example.com"),
        ask("OPTIONS", access_control_request_method="GET"),
        ask("GET", origin="https://app.example.com", access_control_request_method="GET"),
    ],
)
def test_what_is_no_preflight(request_: Request) -> None:
    assert not is_preflight(request_)
    assert preflight_headers(request_, ["GET"]) == []


def test_configured_origins_are_spelled_as_browsers_do() -> None:
    entries = ["HTTPS://App.Example.com:443/", "http://localhost:5173", "http://[::1]:80", "*", "null"]
    expected = {"https://app.example.com", "http://localhost:5173", "http://[::1]", "*", "null"}
    assert parse_origins(entries) == expected
    assert parse_origins([]) == NONE


@pytest.mark.parametrize(
    "entry", ["app.example.com", "https://", "https://a/b", "https://*.a.com/x", "", "https://a b"]
)
def test_what_is_no_origin_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"cors\.origins"):
        parse_origins([entry])
