from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.fields import is_id
from protocol.request import Request
from server import auth
from server.auth import ANONYMOUS, Authenticator, Identity, Patterns, bad_token, credential, unauthorized
from server.config import Auth, ConfigError
from server.keys import sign_token

SECRET = "correct horse battery staple, and then some more words to fill sixty-four"
NOW = 1_750_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@cache
def private_key(kind: str) -> Any:
    """Real keys, made once; "RS256b" and so on are second keys of a kind."""
    curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
    kind = kind.rstrip("b")
    if kind in curves:
        return ec.generate_private_key(curves[kind])
    if kind.startswith(("RS", "PS")):
        return rsa.generate_private_key(65537, 2048)
    return ed448.Ed448PrivateKey.generate() if kind == "Ed448" else ed25519.Ed25519PrivateKey.generate()


def private_pem(kind: str) -> str:
    pem: bytes = private_key(kind).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


def public_pem(kind: str) -> str:
    pem: bytes = private_key(kind).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def configured(algorithm: str = "HS256", **keys: str) -> Auth:
    values: dict[str, Any] = {"jwt_algorithm": algorithm, **(keys or {"jwt_key": SECRET})}
    return Auth(**values)


def authenticator(algorithm: str = "HS256", **keys: str) -> Authenticator:
    return Authenticator(configured(algorithm, **keys), clock=lambda: NOW)


def token(key: Any = SECRET, algorithm: str = "HS256", headers: Any = None, **claims: Any) -> str:
    return jwt.encode({"sub": "ann", **claims}, key, algorithm=algorithm, headers=headers)


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(header: object, claims: object, secret: bytes = SECRET.encode()) -> str:
    """A token HMAC-signed by hand, with what no library would put into one."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    signed = ".".join(map(encode, parts))
    return signed + "." + encode(hmac.new(secret, signed.encode(), hashlib.sha256).digest())


def refusal(verify: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        verify()
    error = caught.value
    assert error.status == 401
    assert dict(error.headers) == {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    for internal in ("jwt", "Traceback", "exception", SECRET):
        assert internal not in error.message
    return error


def assert_bad(authority: Authenticator, bad: str, code: str = "invalid_token") -> None:
    assert refusal(lambda: authority.verify(bad)).code == code


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


# --- signatures and keys ---

ASYMMETRIC = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_secrets(algorithm: str, tmp_path: Path) -> None:
    signed = token(algorithm=algorithm)
    assert authenticator(algorithm).verify(signed).user == "ann"
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    assert authenticator(algorithm, jwt_key_file=str(path)).verify(signed).user == "ann"
    assert_bad(authenticator(algorithm, jwt_key=SECRET + "x"), signed)


@pytest.mark.parametrize("algorithm", ASYMMETRIC)
def test_pem_keys(algorithm: str, tmp_path: Path) -> None:
    signed = token(private_key(algorithm), algorithm)
    path = tmp_path / "key.pem"
    path.write_text(public_pem(algorithm))
    for keys in (
        {"jwt_key": public_pem(algorithm)},
        {"jwt_key": private_pem(algorithm)},  # its public half is derived
        {"jwt_key_file": str(path)},
    ):
        assert authenticator(algorithm, **keys).verify(signed).user == "ann"
    assert_bad(authenticator(algorithm, jwt_key=public_pem(algorithm + "b")), signed)


def test_ed448_and_certificates() -> None:
    assert authenticator("EdDSA", jwt_key=public_pem("Ed448")).verify(token(private_key("Ed448"), "EdDSA"))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")])
    start = datetime.now(UTC)
    key = private_key("ES256")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    assert authenticator("ES256", jwt_key=certificate.decode()).verify(token(key, "ES256")).user == "ann"


def test_a_secret_without_an_algorithm_means_hs256() -> None:
    assert authenticator("").verify(token()).user == "ann"
    assert_bad(authenticator(""), token(algorithm="HS512"))


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


@pytest.mark.parametrize("depth", [200, 1500, 2900])
def test_deep_claims_are_an_identity_or_401(depth: int) -> None:
    deep = b'{"sub":"ann","x":' + b"[" * depth + b"]" * depth + b"}"
    verify_or_401(forge({"alg": "HS256"}, deep))


def test_a_huge_token_is_refused_even_if_genuine() -> None:
    assert_bad(authenticator(), token(padding="x" * 8192))
    assert authenticator().verify(token(padding="x" * 5000)).user == "ann"


# --- JWK sets ---


def jwk(kind: str, kid: object = None, private: bool = False, **members: Any) -> dict[str, object]:
    from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

    key = private_key(kind) if private else private_key(kind).public_key()
    maker: Any = {"R": RSAAlgorithm, "P": RSAAlgorithm, "ES": ECAlgorithm, "Ed": OKPAlgorithm}
    maker = maker.get(kind[:2]) or maker[kind[:1]]
    made: dict[str, object] = maker.to_jwk(key, as_dict=True)
    made.pop("key_ops", None)
    return {**made, **({} if kid is None else {"kid": kid}), **members}


@pytest.fixture
def jwks(tmp_path: Path) -> Callable[..., str]:
    def write(*keys: object) -> str:
        path = tmp_path / "jwks.json"
        path.write_text(json.dumps({"keys": keys}))
        return str(path)

    return write


def test_a_key_is_chosen_by_kid(jwks: Callable[..., str]) -> None:
    path = jwks(jwk("RS256", "one"), jwk("RS256b", "two", use="sig", alg="RS256"))
    authority = authenticator("RS256", jwks_file=path)
    assert authority.verify(token(private_key("RS256"), "RS256", {"kid": "one"})).user == "ann"
    assert authority.verify(token(private_key("RS256b"), "RS256", {"kid": "two"})).user == "ann"
    assert_bad(authority, token(private_key("RS256"), "RS256", {"kid": "two"}))
    assert_bad(authority, token(private_key("RS256"), "RS256"))  # either could be meant


@pytest.mark.parametrize("kid", ["two", "", "One", "one ", "../one", "/dev/null", "' or 1=1 --", 1, ["one"], {"a": 1}])
def test_any_other_kid_is_bad(kid: object, jwks: Callable[..., str]) -> None:
    def signed(kid: object) -> str:
        text = ".".join(encode(json.dumps(part).encode()) for part in ({"alg": "RS256", "kid": kid}, {"sub": "ann"}))
        return text + "." + encode(private_key("RS256").sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))

    authority = authenticator("RS256", jwks_file=jwks(jwk("RS256", "one")))
    assert authority.verify(signed("one")).user == "ann"
    assert_bad(authority, signed(kid))


@pytest.mark.parametrize("kind", ["ES256", "EdDSA", "PS256"])
def test_the_only_key_needs_no_kid(kind: str, jwks: Callable[..., str]) -> None:
    path = jwks(jwk(kind, "one"), jwk("RS256", "two", use="enc"), jwk("ES384", "one"), "no key", {"kty": "new"})
    authority = authenticator(kind, jwks_file=path)
    assert authority.verify(token(private_key(kind), kind)).user == "ann"
    assert authority.verify(token(private_key(kind), kind, {"kid": "one"})).user == "ann"
    assert_bad(authority, token(private_key(kind), kind, {"kid": "two"}))


def test_a_set_with_one_nameless_key(jwks: Callable[..., str]) -> None:
    authority = authenticator("ES256", jwks_file=jwks(jwk("ES256")))
    assert authority.verify(token(private_key("ES256"), "ES256")).user == "ann"
    assert_bad(authority, token(private_key("ES256"), "ES256", {"kid": "any"}))


@pytest.mark.parametrize("members", [{"use": "enc"}, {"alg": "RS512"}, {"key_ops": ["encrypt"]}, {"key_ops": "verify"}])
def test_keys_for_something_else_are_not_used(members: dict[str, Any], jwks: Callable[..., str]) -> None:
    path = jwks(jwk("RS256", "one", **members), jwk("RS256b", "two"))
    authority = authenticator("RS256", jwks_file=path)
    assert_bad(authority, token(private_key("RS256"), "RS256", {"kid": "one"}))
    assert authority.verify(token(private_key("RS256b"), "RS256")).user == "ann"
    with pytest.raises(ConfigError, match="holds no key for RS256"):
        authenticator("RS256", jwks_file=jwks(jwk("RS256", "one", **members)))


def test_private_keys_and_secrets_in_a_set(jwks: Callable[..., str]) -> None:
    path = jwks(jwk("ES256", "one", private=True, key_ops=["sign"]))
    assert authenticator("ES256", jwks_file=path).verify(token(private_key("ES256"), "ES256")).user == "ann"
    secret = {"kty": "oct", "kid": "s", "k": encode(SECRET.encode())}
    authority = authenticator("HS256", jwks_file=jwks(secret, jwk("RS256", "s")))
    assert authority.verify(token()).user == "ann"
    assert authority.verify(token(headers={"kid": "s"})).user == "ann"
    with pytest.raises(ConfigError, match=r"keys\[0\] has 5 bytes"):
        authenticator("HS256", jwks_file=jwks({"kty": "oct", "k": encode(b"short")}))


def test_a_token_cannot_bring_its_own_key(jwks: Callable[..., str]) -> None:
    header = {"jwk": jwk("ES256b"), "jku": "http://127.0.0.1/jwks.json", "x5u": "http://127.0.0.1/x", "kid": "one"}
    forged = token(private_key("ES256b"), "ES256", header)
    assert_bad(authenticator("ES256", jwks_file=jwks(jwk("ES256", "one"))), forged)
    assert_bad(authenticator("ES256", jwt_key=public_pem("ES256")), forged)


def test_bad_sets_are_refused(jwks: Callable[..., str], tmp_path: Path) -> None:
    duplicates = jwks(jwk("RS256", "one"), jwk("RS256b", "one"))
    with pytest.raises(ConfigError, match="a second key for RS256 with kid 'one'"):
        authenticator("RS256", jwks_file=duplicates)
    with pytest.raises(ConfigError, match="kid must be a string"):
        authenticator("RS256", jwks_file=jwks(jwk("RS256", 7)))
    with pytest.raises(ConfigError, match=r"keys\[1\] cannot be read"):
        authenticator("ES256", jwks_file=jwks(jwk("ES256"), {**jwk("ES256"), "x": "!!"}))
    with pytest.raises(ConfigError, match="jwt_algorithm is not set"):
        authenticator("", jwks_file=jwks(jwk("RS256")))
    path = tmp_path / "bad.json"
    for text in ("", "[]", "{}", '{"keys": 1}', "[" * 100_000, '"keys"', "\udcff"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ConfigError, match="is not a JWK set"):
            authenticator("RS256", jwks_file=str(path))
    path.write_text('{"keys": []}')
    with pytest.raises(ConfigError, match="holds no key for RS256"):
        authenticator("RS256", jwks_file=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        authenticator("RS256", jwks_file=str(tmp_path / "none.json"))


# --- configuration ---


def weak_rsa() -> str:
    pem = rsa.generate_private_key(65537, 1024).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


def encrypted() -> str:
    key = private_key("ES256")
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
    return pem.decode()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (configured("HS256", jwt_key="x" * 31), "31 bytes; a secret for HS256 must have 32"),
        (configured("HS384", jwt_key="x" * 47), "47 bytes; a secret for HS384 must have 48"),
        (configured("HS512", jwt_key="x" * 63), "63 bytes; a secret for HS512 must have 64"),
        (configured("", jwt_key="short"), "5 bytes"),
        (configured("HS256", jwt_key=public_pem("RS256")), "is no secret; did you mean RS256"),
        (configured("HS256", jwt_key=private_pem("ES256")), "is no secret; did you mean RS256"),
        (configured("HS256", jwt_key="ssh-ed25519 " + "A" * 60), "a key of another form"),
        (configured("HS256", jwt_key=json.dumps(jwk("RS256"))), "a key of another form"),
        (configured("RS256"), "jwt_key is not a PEM key"),
        (configured("", jwt_key=public_pem("RS256")), "jwt_algorithm is not set; it is one of"),
        (configured("none"), "jwt_algorithm = 'none' is not known"),
        (configured("HS1", jwt_key=SECRET), "not known"),
        (configured("RS256", jwt_key=public_pem("ES256")), r"needs an RSA key .* another kind of key \(EC"),
        (configured("ES256", jwt_key=private_pem("RS256")), r"needs an EC key .* another kind of key \(RSA"),
        (configured("ES256", jwt_key=public_pem("ES384")), "P-256"),
        (configured("EdDSA", jwt_key=public_pem("ES256")), "Ed25519"),
        (configured("RS256", jwt_key=weak_rsa()), "1024 bits"),
        (configured("ES256", jwt_key=encrypted()), "encrypted"),
        (configured("ES256", jwt_key=public_pem("ES256")[:60]), "cannot be read as a PEM"),
        (configured("ES256", jwt_key_file="/nonexistent/key"), "jwt_key_file = '/nonexistent/key' cannot be read: No"),
        (Auth(jwt_audience="here"), "jwt_audience is set without a key"),
        (Auth(jwt_issuer="there"), "jwt_issuer is set without a key"),
    ],
)
def test_unfit_keys_are_refused_at_load(config: Auth, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Authenticator(config)
    assert config.jwt_key == "" or config.jwt_key not in str(caught.value)


def test_an_empty_key_file_is_no_open_mode(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="0 bytes"):
        Authenticator(configured("HS256", jwt_key_file=str(path)))


def test_sign_token(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text(private_pem("EdDSA"))
    config = configured("EdDSA", jwt_key_file=str(path))
    assert Authenticator(config).verify(sign_token(config, {"sub": "bob", "admin": True})).admin
    assert authenticator().verify(sign_token(configured(), {"sub": "bob"})).user == "bob"
    with pytest.raises(ConfigError, match="holds only a public key"):
        sign_token(configured("EdDSA", jwt_key=public_pem("EdDSA")), {})
    for config in (Auth(), configured("RS256", jwks_file="x")):
        with pytest.raises(ConfigError, match="signing a token needs"):
            sign_token(config, {})


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
