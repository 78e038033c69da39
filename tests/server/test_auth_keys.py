"""Keys of tokens: secrets, PEM, JWK sets; which of them are taken, and which are refused when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from server.auth import Authenticator
from server.config import Auth, ConfigError
from server.keys import sign_token
from tests.server.tokens import (
    SECRET,
    assert_bad,
    authenticator,
    configured,
    encode,
    jwk,
    private_key,
    private_pem,
    public_pem,
    token,
)

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


# --- JWK sets ---


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
