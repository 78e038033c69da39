"""Tokens: signatures, claims, those that are remembered; and that nothing but 401 comes of any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.fields import is_id
from server import auth
from server.auth import Authenticator, Identity, bad_token
from server.config import Auth, ConfigError
from tests.server.tokens import (
    NOW,
    SECRET,
    Clock,
    assert_bad,
    authenticator,
    configured,
    encode,
    forge,
    private_key,
    private_pem,
    public_pem,
    token,
)

# --- signatures ---


def test_the_algorithm_is_pinned() -> None:
    for other in ("HS384", "HS512"):
        assert_bad(authenticator(), token(algorithm=other))
    # The same RSA key, another algorithm.
    for other in ("RS384", "PS256"):
        assert_bad(authenticator("RS256", jwt_key=public_pem("RS256")), token(private_key("RS256"), other))


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", None, "hs256", "HS256 ", ["HS256"], {"HS256": 1}, 1, True])
def test_no_other_name_of_an_algorithm_passes(alg: object) -> None:
    header = {"typ": "JWT", "alg": alg}
    genuine = forge(header, {"sub": "ann", "admin": True})
    assert_bad(authenticator(), genuine)
    assert_bad(authenticator(), genuine.rpartition(".")[0] + ".")
    assert_bad(authenticator("RS256", jwt_key=public_pem("RS256")), genuine.rpartition(".")[0] + ".")


def test_alg_missing() -> None:
    assert_bad(authenticator(), forge({"typ": "JWT"}, {"sub": "ann"}))


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_is_no_hmac_secret(algorithm: str) -> None:
    pem = public_pem(algorithm)
    for authority in (authenticator(algorithm, jwt_key=pem), authenticator(algorithm, jwt_key=private_pem(algorithm))):
        for secret in (pem, pem.rstrip("\n")):
            for alg in ("HS256", algorithm):
                assert_bad(authority, forge({"alg": alg}, {"sub": "ann"}, secret.encode()))


def test_a_tampered_token_is_bad() -> None:
    header, claims, signature = token().split(".")
    other = token(admin=True).split(".")
    authority = authenticator()
    authority.verify(f"{header}.{claims}.{signature}")
    for bad in (
        f"{header}.{other[1]}.{signature}",
        f"{header}.{claims}.{other[2]}",
        f"{header}.{claims}.",
        f"{header}.{claims}",
        f"{header}.{claims}.{signature}.{signature}",
        f"{header}.{claims}.{signature}A",
        f"{header}.{claims}.{signature} ",
        f" {header}.{claims}.{signature}",
        f"{header}..{signature}",
        f".{claims}.{signature}",
        "..",
        ".",
        "",
    ):
        assert_bad(authority, bad)


@pytest.mark.parametrize(
    "bad",
    [
        "x" * 8193,
        "ä",
        "\ud800",
        "\x00",
        token()[:-1] + "é",
        forge(b'{"alg":"HS256"}', b"\xff\xfe"),
        forge(b"\xff", {"sub": "ann"}),
        forge({"alg": "HS256"}, b"[" * 5000),
        forge({"alg": "HS256"}, ["sub", "ann"]),
        forge({"alg": "HS256"}, "ann"),
        forge({"alg": "HS256"}, None),
        forge(["HS256"], {"sub": "ann"}),
        forge({"alg": "HS256"}, b'{"sub":"ann","exp":' + b"9" * 5000 + b"}"),
        forge({"alg": "HS256"}, b'{"sub":"ann","exp":' + b"9" * 400 + b"}"),
        forge({"alg": "HS256", "crit": ["exp"]}, {"sub": "ann"}),
        forge({"alg": "HS256", "crit": ["b64"], "b64": False}, {"sub": "ann"}),
        forge({"alg": "HS256", "kid": 1}, {"sub": "ann"}),
    ],
)
def test_what_is_hardly_a_token(bad: str) -> None:
    assert_bad(authenticator(), bad)


def test_of_a_repeated_name_the_last_counts_and_the_algorithm_stays_pinned() -> None:
    """RFC 7519 section 4: refuse such claims, or take the last."""
    claims = b'{"sub":"root","admin":true,"sub":"ann","admin":false}'
    identity = authenticator().verify(forge({"alg": "HS256"}, claims))
    assert (identity.user, identity.admin) == ("ann", False)
    for header in (b'{"alg":"HS256","alg":"none"}', b'{"alg":"HS256","alg":"HS512"}'):
        assert_bad(authenticator(), forge(header, {"sub": "ann"}))
        assert_bad(authenticator(), forge(header, {"sub": "ann"}).rpartition(".")[0] + ".")


def test_a_huge_token_is_refused_even_if_genuine() -> None:
    assert_bad(authenticator(), token(padding="x" * 8192))
    assert authenticator().verify(token(padding="x" * 5000)).user == "ann"


# --- claims ---


def test_a_plain_token() -> None:
    assert authenticator().verify(token()) == Identity("ann")


def test_everything_in_a_token() -> None:
    identity = authenticator().verify(
        token(
            sub="team:ann@example.com",
            admin=True,
            capabilities=["publish", "ops", "fly"],
            jobs=["job_1", "export-*"],
            channels=["news-*"],
            exp=NOW + 60,
            nbf=NOW,
            iat=NOW - 1,
            jti="1",
            iss="anyone",
            aud=[],
        )
    )
    assert identity == Identity(
        user="team:ann@example.com",
        admin=True,
        capabilities=frozenset({"publish", "ops"}),
        jobs=("job_1", "export-*"),
        expires_at=NOW + 60,
        channels=("news-*",),
    )


@pytest.mark.parametrize("admin", ["true", "True", 1, 1.0, [True], {"a": 1}, None, False, ""])
def test_only_true_is_admin(admin: object) -> None:
    assert not authenticator().verify(token(admin=admin)).admin


BAD_VALUES: dict[str, list[object]] = {
    "sub": [
        *("", "a b", "x" * 129, "ann\n", "ann\r\n", "ann\x00", "ann\u2028", "\ud800", "änn", "a/b", "queue:v"),
        *(1, 1.5, True, None, ["ann"], {"id": "ann"}),
    ],
    "capabilities": ["publish", None, {"publish": True}, ["publish", 1], [["publish"]], True],
    "exp": ["", "123", "9" * 20, True, None, [NOW + 5], {}, float("nan"), float("inf"), 10**400],
    "nbf": ["", "123", True, None, [NOW - 5], {}, float("nan"), float("-inf"), NOW + 2, 1e300],
    "iat": ["", "123", True, None, [NOW - 5], {}, float("nan"), float("-inf"), NOW + 2],
    "jobs": ["job_1", None, [1], [["a"]], {"a": 1}, [""], ["*"], ["*-a"], ["a b"], ["a?"], ["x" * 129], ["a\n"]],
    "channels": ["news", None, [1], [None], {"a": 1}, ["*a"], ["a/b"], ["ä"]],
    "aud": ["somebody", ["a", "b"], 1],
    "jti": [1],
}
BAD_CLAIMS = [{name: value} for name, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize("claims", BAD_CLAIMS, ids=repr)
def test_bad_claims(claims: Mapping[str, object]) -> None:
    assert_bad(authenticator(), forge({"alg": "HS256"}, {"sub": "ann", **claims}))


def test_patterns_are_bounded_in_number() -> None:
    def with_jobs(count: int) -> str:
        return token(jobs=["a"] * count)

    assert len(authenticator().verify(with_jobs(1000)).jobs) == 1000
    assert_bad(authenticator(), with_jobs(1001))


def test_sub_is_required() -> None:
    assert_bad(authenticator(), forge({"alg": "HS256"}, {"admin": True}))


def test_the_clock_of_the_issuer_may_be_a_second_ahead() -> None:
    assert authenticator().verify(token(iat=NOW + 1, nbf=NOW + 1)).user == "ann"


@pytest.mark.parametrize(("exp", "good"), [(NOW + 0.5, True), (NOW, False), (NOW - 1, False), (0, False), (-1, False)])
def test_exp_is_exact(exp: float, good: bool) -> None:
    if good:
        assert authenticator().verify(token(exp=exp)).expires_at == exp
    else:
        assert_bad(authenticator(), token(exp=exp), "token_expired")


def test_only_a_genuine_token_is_told_that_it_expired() -> None:
    assert_bad(authenticator(), token("x" * 40, exp=NOW - 5), "invalid_token")


def test_audience_and_issuer() -> None:
    authority = authenticator(jwt_key=SECRET, jwt_audience="here", jwt_issuer="https://issuer.example")
    good: dict[str, Any] = {"aud": "here", "iss": "https://issuer.example"}
    assert authority.verify(token(**good)).user == "ann"
    assert authority.verify(token(**{**good, "aud": ["there", "here"]})).user == "ann"
    others: list[dict[str, Any]] = [{"aud": "there"}, {"aud": ["there"]}, {"aud": []}, {"aud": "HERE"}, {"iss": "x"}]
    for other in others:
        assert_bad(authority, token(**{**good, **other}))
    for missing in good:
        assert_bad(authority, token(**{name: value for name, value in good.items() if name != missing}))
    assert_bad(authority, forge({"alg": "HS256"}, {"sub": "ann", **good, "iss": ["https://issuer.example"]}))


# --- remembered tokens ---


def test_a_remembered_token_is_not_verified_again_and_ends_on_time() -> None:
    clock = Clock()
    authority = Authenticator(configured(), clock=clock)
    signed = token(exp=NOW + 10)
    first = authority.verify(signed)
    assert authority.verify(signed) is first
    clock.now = NOW + 9.9
    assert authority.verify(signed) is first
    clock.now = NOW + 10
    assert_bad(authority, signed, "token_expired")
    assert authority.remembered == 0


def test_bad_tokens_are_not_remembered() -> None:
    authority = authenticator()
    for bad in ("x.y.z", token("y" * 40), token(sub="a b")):
        assert_bad(authority, bad)
    assert_bad(authority, token(exp=NOW - 1), "token_expired")
    assert authority.remembered == 0


def test_tokens_without_an_end_are_verified_anew_and_then_forgotten() -> None:
    clock = Clock()
    authority = Authenticator(configured(), clock=clock)
    first = authority.verify(token())
    authority.verify(token(sub="gone"))
    clock.now = NOW + auth.CACHED_SECONDS
    again = authority.verify(token())
    assert again == first
    assert again is not first
    assert authority.remembered == 1


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "CACHED_TOKENS", 3)
    authority = authenticator()
    kept = authority.verify(token())
    for number in range(20):
        authority.verify(token(sub=f"user{number}", exp=NOW + 10 + number))
        assert authority.remembered <= 3
    assert authority.verify(token()) is kept  # what ends soonest goes first


def test_reload_takes_new_keys_and_forgets_tokens() -> None:
    authority = authenticator()
    signed = token()
    authority.verify(signed)
    authority.reload(configured(jwt_key="another secret that is long enough for this"))
    assert authority.remembered == 0
    assert_bad(authority, signed)
    authority.reload(configured("ES256", jwt_key=public_pem("ES256")))
    assert authority.verify(token(private_key("ES256"), "ES256")).user == "ann"
    assert_bad(authority, signed)


def test_a_bad_reload_keeps_the_old_keys() -> None:
    authority = authenticator()
    kept = authority.verify(token())
    for config in (configured(jwt_key="short"), configured("RS256"), Auth()):
        with pytest.raises(ConfigError):
            authority.reload(config)
    assert authority.verify(token()) is kept
    assert not authority.open
    unlocked = Authenticator(Auth())
    with pytest.raises(ConfigError, match="restart"):
        unlocked.reload(configured())
    assert unlocked.open
    unlocked.reload(Auth())


# --- nothing but 401 comes out ---


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
CLAIM = st.sampled_from(["sub", "admin", "capabilities", "jobs", "channels", "exp", "nbf", "iat", "aud", "iss", "jti"])
HEADER = st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "x5c", "zip", "enc", "cty"])


AUTHORITIES = [
    authenticator(),
    authenticator("RS256", jwt_key=public_pem("RS256")),
    authenticator("ES256", jwt_key=public_pem("ES256")),
    authenticator("EdDSA", jwt_key=public_pem("EdDSA")),
]


def verify_or_401(text: str) -> None:
    for authority in AUTHORITIES:
        try:
            identity = authority.verify(text)
        except ApiError as error:
            assert (error.status, error.code) in {(401, "invalid_token"), (401, "token_expired")}  # noqa: PT017
        else:
            assert is_id(identity.user)
            assert identity.expires_at is None or identity.expires_at > NOW


@pytest.mark.parametrize("depth", [200, 1500, 2900])
def test_deep_claims_are_an_identity_or_401(depth: int) -> None:
    deep = b'{"sub":"ann","x":' + b"[" * depth + b"]" * depth + b"}"
    verify_or_401(forge({"alg": "HS256"}, deep))


@given(st.text(max_size=200) | st.text("abcdefgEYJ0129-_=.", max_size=200))
def test_any_text_is_401(text: str) -> None:
    with pytest.raises(ApiError):
        authenticator().verify(text)
    verify_or_401(text)


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=80))
def test_any_segments_are_401(header: bytes, claims: bytes, signature: bytes) -> None:
    verify_or_401(".".join(map(encode, (header, claims, signature))))
    verify_or_401(".".join([encode(b'{"alg":"HS256"}'), encode(claims), encode(signature)]))


@given(JSON | st.dictionaries(CLAIM, JSON))
def test_any_signed_claims_are_an_identity_or_401(claims: object) -> None:
    verify_or_401(forge({"alg": "HS256"}, claims))
    if isinstance(claims, dict):
        verify_or_401(forge({"alg": "HS256"}, {"sub": "ann", **claims}))


@given(st.dictionaries(HEADER, JSON))
def test_any_signed_header_is_an_identity_or_401(header: dict[str, object]) -> None:
    verify_or_401(forge(header, {"sub": "ann"}))
    verify_or_401(forge({"alg": "HS256", **header}, {"sub": "ann"}))


@given(st.integers(0, 200), st.integers(0, 127))
def test_any_changed_character_is_401(at: int, char: int) -> None:
    good = token(exp=NOW + 60)
    at %= len(good)
    changed = good[:at] + chr(char) + good[at + 1 :]
    if changed != good:
        assert_bad(authenticator(), changed)


def test_bad_token_has_a_default() -> None:
    assert bad_token().message == "the token is not valid"
