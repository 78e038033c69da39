"""Where a request carries its token, and what an identity may do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.request import Request
from server import auth
from server.auth import ANONYMOUS, Authenticator, Identity, Patterns, credential, unauthorized
from server.config import Auth
from tests.server.tokens import NOW, assert_bad, authenticator, configured, refusal, token

# --- credentials ---


def ask(query: dict[str, str] | None = None, **headers: str) -> Request:
    return Request("GET", "/", "/", query or {}, {name.replace("_", "-"): value for name, value in headers.items()})


async def test_open_mode_makes_everyone_an_admin() -> None:
    authority = Authenticator(Auth())
    assert authority.open
    identity = await authority.identify(ask(authorization="Basic abc"))
    assert identity is ANONYMOUS
    assert identity.admin
    assert identity.user == "anonymous"
    assert identity.expires_at is None
    assert authority.verify("anything") is ANONYMOUS


def test_open_mode_does_not_import_the_token_library() -> None:
    code = (
        "import sys; from server.auth import Authenticator; from server.config import Auth; "
        "Authenticator(Auth()); sys.exit('jwt' in sys.modules or 'cryptography' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(auth.__file__).parents[1])


async def test_a_hook_alone_is_not_open_mode() -> None:
    authority = Authenticator(Auth(hook_url="http://127.0.0.1/who"))
    assert not authority.open
    assert await authority.identify(ask()) is None
    assert_bad(authority, token())


async def test_no_credential_is_no_identity() -> None:
    authority = authenticator()
    assert not authority.open
    assert await authority.identify(ask()) is None
    logged_out = ask(cookie="other=1; statuswire_token=", sec_websocket_protocol="statuswire.v1")
    assert await authority.identify(logged_out) is None
    error = unauthorized()
    assert (error.status, error.code, error.headers) == (401, "unauthorized", (("WWW-Authenticate", "Bearer"),))


@pytest.mark.parametrize(
    "request_",
    [
        ask(authorization="Bearer TOKEN"),
        ask(authorization="bearer   TOKEN "),
        ask(sec_websocket_protocol="bearer.TOKEN"),
        ask(sec_websocket_protocol="statuswire.v1, bearer.TOKEN"),
        ask({"access_token": "TOKEN"}),
        ask(cookie="a=b; statuswire_token=TOKEN"),
        # The first that is present wins.
        ask(
            {"access_token": "query"},
            authorization="Bearer TOKEN",
            sec_websocket_protocol="bearer.protocol",
            cookie="statuswire_token=cookie",
        ),
        ask({"access_token": "query"}, sec_websocket_protocol="bearer.TOKEN", cookie="statuswire_token=cookie"),
        ask({"access_token": "TOKEN"}, cookie="statuswire_token=cookie"),
    ],
)
def test_where_the_token_is_found(request_: Request) -> None:
    assert credential(request_) == "TOKEN"


async def test_identify_verifies_what_it_finds() -> None:
    authority = authenticator()
    identity = await authority.identify(ask(authorization="Bearer " + token()))
    assert identity is not None
    assert identity.user == "ann"
    # A bad credential is not made good by another one further down.
    for bad in ("bad", ""):
        with pytest.raises(ApiError) as caught:
            await authority.identify(ask({"access_token": bad}, cookie="statuswire_token=" + token()))
        assert caught.value.status == 401


@pytest.mark.parametrize("value", ["Bearer", "Bearer ", "", "TOKEN", "Bearer:TOKEN"])
def test_a_malformed_authorization_header_is_401(value: str) -> None:
    good = {"access_token": token()}
    assert refusal(lambda: credential(ask(good, authorization=value))).code == "invalid_token"


@pytest.mark.parametrize("value", ["Basic YTpi", "Digest Bearer x"])
async def test_another_scheme_is_passed_over_if_there_is_a_token_besides(value: str) -> None:
    identity = await authenticator().identify(ask({"access_token": token()}, authorization=value))
    assert identity is not None
    assert identity.user == "ann"
    for query in ({"access_token": "bad"}, {}):
        with pytest.raises(ApiError) as caught:
            await authenticator().identify(ask(query, authorization=value))
        assert caught.value.status == 401


# --- what an identity may do ---


def test_may_read() -> None:
    ann = Identity("ann", jobs=("job_1", "export-*"))
    assert ann.may_read("any", "ann")
    assert ann.may_read("job_1", "bob")
    assert ann.may_read("export-7", "bob")
    assert not ann.may_read("job_12", "bob")
    assert not ann.may_read("my-export-7", "bob")
    assert ann.names_job("export-")
    assert not ann.names_job("any")
    assert Identity("root", admin=True).may_read("any", "bob")
    assert not Identity("root", admin=True).names_job("any")
    assert not Identity("bob").may_read("any", "ann")


def test_can() -> None:
    ann = Identity("ann", capabilities=frozenset({"publish"}))
    assert ann.can("publish")
    assert not ann.can("ops")
    assert all(Identity("root", admin=True).can(capability) for capability in ("publish", "notify", "ops"))


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a*c", "abc", True),
        ("a*c", "ac", True),
        ("a*c", "acb", False),
        ("ab*ba", "aba", False),  # the two ends must not overlap
        ("ab*ba", "abba", True),
        ("a**c", "axc", True),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "a-c-b", False),
        ("a*bc*bc", "abcbc", True),
        ("a*bc*bc", "abc", False),
        ("a**", "a", True),
        ("a.c", "abc", False),
        ("a", "A", False),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert Patterns([pattern]).match(name) is matches
    assert Patterns(["other", pattern, "x*"]).match(name) is matches


def reference(pattern: str, name: str) -> bool:
    """The definition, by dynamic programming: which prefixes of the name the pattern read so far can match."""
    reach = [True] + [False] * len(name)
    for wanted in pattern:
        if wanted == "*":
            reach = [any(reach[: at + 1]) for at in range(len(reach))]
        else:
            reach = [False] + [reach[at] and name[at] == wanted for at in range(len(name))]
    return reach[-1]


@given(st.from_regex(r"[ab][ab*]{0,8}", fullmatch=True), st.text("ab", max_size=12))
def test_patterns_match_by_definition(pattern: str, name: str) -> None:
    assert Patterns([pattern]).match(name) is reference(pattern, name)


def test_channels_of_those_who_have_no_claim() -> None:
    authority = Authenticator(
        msgspec.structs.replace(configured("HS256"), default_channels=("open-*",)), clock=lambda: NOW
    )
    bare, some, none = (
        authority.verify(token(**claims)) for claims in ({}, {"channels": ["team-*", "all"]}, {"channels": []})
    )
    for channel, allowed in (
        ("open-1", (True, False, False)),
        ("team-1", (False, True, False)),
        ("all", (False, True, False)),
        ("alle", (False, False, False)),
    ):
        found = tuple(identity.may_join(channel, authority.default_channels) for identity in (bare, some, none))
        assert found == allowed, channel
    assert authority.verify(token(admin=True, channels=[])).may_join("any", authority.default_channels)
    assert authority.verify(token(channels=["*"])).may_join("any", authority.default_channels)
