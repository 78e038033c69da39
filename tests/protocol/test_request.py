from __future__ import annotations

from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.request import MAX_PARAMETERS, Request, parse_query, parse_target, percent_decode, valid_authority


def make(target: str = "/", **headers: str) -> Request:
    return Request(
        "GET", target, target.partition("?")[0], headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1&b=2", {"a": "1", "b": "2"}),
        ("a", {"a": ""}),
        ("a=", {"a": ""}),
        ("=1", {"": "1"}),
        ("&&a=1&&", {"a": "1"}),
        ("a=b=c", {"a": "b=c"}),
        ("a=x+y%20z", {"a": "x y z"}),
        ("a=%2B", {"a": "+"}),
        ("a%20b=1", {"a b": "1"}),
        ("jobIds=a%2Cb,c", {"jobIds": "a,b,c"}),
        ("a=%F0%9F%98%80", {"a": "\N{GRINNING FACE}"}),
        ("a=1;b=2", {"a": "1;b=2"}),
        ("a=?", {"a": "?"}),
    ],
)
def test_query_is_parsed(text: str, expected: dict[str, str]) -> None:
    assert parse_query(text) == expected


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("a=1&a=2", "a"),
        ("a=1&b=1&%61=2", "a"),
        ("a=%", "a"),
        ("a=%4", "a"),
        ("a=%zz", "a"),
        ("a=%ff", "a"),
        ("a=%ED%A0%80", "a"),
        ("a=%C0%AF", "a"),
        ("%zz=1", "%zz"),
        ("x" * 100 + "=%", "x" * 64),
    ],
)
def test_bad_query_names_the_parameter(text: str, field: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_query(text)
    assert (caught.value.status, caught.value.code, caught.value.field) == (400, "invalid_parameter", field)


def test_the_number_of_parameters_is_bounded() -> None:
    pairs = [f"p{i}=1" for i in range(MAX_PARAMETERS)]
    assert len(parse_query("&".join(pairs) + "&" * 500)) == MAX_PARAMETERS
    with pytest.raises(ApiError) as caught:
        parse_query("&".join([*pairs, "more=1"]))
    assert (caught.value.status, caught.value.code) == (400, "invalid_parameter")


@given(
    st.dictionaries(st.text(st.characters(exclude_characters="\0", codec="utf-8")), st.text("aä +&=%?#"), max_size=5)
)
def test_query_round_trips(values: dict[str, str]) -> None:
    # "=" alone stands for an empty name; urlencode writes it just so.
    assert parse_query(urlencode(values)) == values


def test_request_parses_its_query_once_and_only_when_asked() -> None:
    bad = make("/x?a=1&a=2")
    with pytest.raises(ApiError):
        _ = bad.query
    good = make("/x?a=1&b=%20")
    assert good.query == {"a": "1", "b": " "}
    assert good.query is good.query
    assert make("http://h/x?y=1").query == {"y": "1"}
    assert Request("GET", "/", "/", {"given": "1"}, {}).query == {"given": "1"}


def test_request_never_shows_its_query() -> None:
    assert repr(make("/ws/jobs?access_token=secret")) == "<Request GET /ws/jobs HTTP/1.1>"


def test_headers_are_found_in_any_case() -> None:
    request = make(x_request_id="7")
    assert request.header("X-Request-Id") == "7"
    assert request.header("Accept") is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1; b=2;c=3", {"a": "1", "b": "2", "c": "3"}),
        ('a="quoted"', {"a": "quoted"}),
        ('a="', {"a": '"'}),
        ("a=x=y", {"a": "x=y"}),
        ("a=1; a=2", {"a": "1"}),
        (";;; ; garbage; =novalue; \x01\xff; a=1", {"a": "1"}),
        ("a=", {"a": ""}),
    ],
)
def test_cookies_tolerate_garbage(value: str, expected: dict[str, str]) -> None:
    assert make(cookie=value).cookies == expected


@given(st.text(st.characters(max_codepoint=255)))
def test_cookies_never_fail(value: str) -> None:
    assert all(name and ";" not in name for name in make(cookie=value).cookies)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("application/json", "application/json"),
        ("Application/JSON; charset=utf-8", "application/json"),
        ("application/x-ndjson ;x", "application/x-ndjson"),
        ("", ""),
    ],
)
def test_content_type(value: str, expected: str) -> None:
    assert make(content_type=value).content_type == expected


def test_no_content_type() -> None:
    assert make().content_type == ""


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream;q=0.5", True),
        ("application/json, text/event-stream ; q=0.1", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream; q=0.000", False),
        ("*/*", False),
        ("text/*", False),
        ("text/event-streams", False),
        ("", False),
    ],
)
def test_accepts_event_stream(accept: str, expected: bool) -> None:
    assert make(accept=accept).accepts_event_stream is expected


def test_accepts_nothing_without_accept() -> None:
    assert not make().accepts("application/json")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, False),
        ({"content_length": "0"}, False),
        ({"content_length": "00"}, False),
        ({"content_length": "10"}, True),
        ({"transfer_encoding": "chunked"}, True),
    ],
)
def test_has_body(headers: dict[str, str], expected: bool) -> None:
    assert make(**headers).has_body is expected


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/", ("/", None)),
        ("GET", "/a/b?c=/d", ("/a/b", None)),
        ("GET", "//a", ("//a", None)),
        ("GET", "/%61%2f%C3%A4", ("/a/ä", None)),
        ("GET", "/a+b", ("/a+b", None)),
        ("GET", "/a?%zz", ("/a", None)),
        ("OPTIONS", "*", ("*", None)),
        ("GET", "http://host/a?b", ("/a", "host")),
        ("GET", "HTTPS://host:443", ("/", "host:443")),
        ("GET", "http://[::1]:80?a", ("/", "[::1]:80")),
    ],
)
def test_target_forms(method: str, target: str, expected: tuple[str, str | None]) -> None:
    assert parse_target(method, target) == expected


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("CONNECT", "host:443", 405),
        ("CONNECT", "/", 405),
        ("GET", "host:443", 400),
        ("GET", "a", 400),
        ("GET", "*", 400),
        ("GET", "?a", 400),
        ("GET", "ftp://host/", 400),
        ("GET", "http:/host/", 400),
        ("GET", "http:///a", 400),
        ("GET", "http://user:pass@host/", 400),
        ("GET", "http://a,b/", 400),
        ("GET", "/a#b", 400),
        ("GET", "/%", 400),
        ("GET", "/%0", 400),
        ("GET", "/%gg", 400),
        ("GET", "/%00", 400),
        ("GET", "/%0a", 400),
        ("GET", "/%7F", 400),
        ("GET", "/%ff", 400),
        ("GET", "/%C0%80", 400),
    ],
)
def test_bad_targets(method: str, target: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        parse_target(method, target)
    assert caught.value.status == status
    if status == 405:
        assert dict(caught.value.headers)["Allow"]


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])))
def test_paths_round_trip(text: str) -> None:
    assert parse_target("GET", "/" + quote(text))[0] == "/" + text


def test_percent_decode_says_what_is_wrong() -> None:
    assert percent_decode("%c3%A4") == "ä"
    with pytest.raises(ValueError, match="hexadecimal"):
        percent_decode("a%")
    with pytest.raises(ValueError, match="UTF-8"):
        percent_decode("%ff")


@pytest.mark.parametrize(
    "text", ["localhost", "a.example:80", "127.0.0.1:3000", "[::1]", "[::1]:3000", "my_service:1", "a:", "xn--4ca.de."]
)
def test_good_authorities(text: str) -> None:
    assert valid_authority(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":80", "a b", "a,b", "u@h", "u:p@h", "a/b", "a?b", "a#b", "a:b", "a:123456", "::1", "[::1", "[]", "[a]"),
        *("a\x01", "ä", "a:80:80", "a\\b", "%61", "a\n"),
    ],
)
def test_bad_authorities(text: str) -> None:
    assert not valid_authority(text)
