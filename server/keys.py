"""The keys that tokens are verified and signed with: secrets, PEM (RFC 7468) and JWK sets (RFC 7517).

The algorithm is pinned by the configuration and the key is loaded, checked and fitted to it once; a token only
ever chooses among keys that already fit (RFC 8725 sections 3.1 and 3.5). PyJWT and cryptography are imported
when a key is read and not before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import Auth, ConfigError

# What each algorithm verifies with, as (JWK key type, JWK curves or None, words for a person). "none" is absent.
_ALGORITHMS: dict[str, tuple[str, tuple[str, ...] | None, str]] = {
    "HS256": ("oct", None, "a secret of at least 32 bytes"),
    "HS384": ("oct", None, "a secret of at least 48 bytes"),
    "HS512": ("oct", None, "a secret of at least 64 bytes"),
    **dict.fromkeys(("RS256", "RS384", "RS512"), ("RSA", None, "an RSA key of at least 2048 bits")),
    **dict.fromkeys(("PS256", "PS384", "PS512"), ("RSA", None, "an RSA key of at least 2048 bits")),
    "ES256": ("EC", ("P-256",), "an EC key on the curve P-256"),
    "ES384": ("EC", ("P-384",), "an EC key on the curve P-384"),
    "ES512": ("EC", ("P-521",), "an EC key on the curve P-521"),
    "EdDSA": ("OKP", ("Ed25519", "Ed448"), "an Ed25519 or Ed448 key"),
}
# RFC 7518 section 3.2: "A key of the same size as the hash output … or larger MUST be used".
_SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
RSA_BITS = 2048  # RFC 7518 section 3.3


@dataclass(frozen=True, slots=True)
class Keys:
    """What tokens are verified with. Keys are public keys, or bytes for HMAC.

    Attributes:
        default: for a token without ``kid``; None if several keys could be meant.
        by_kid: the keys of a JWK set; None without one, and ``kid`` is then not looked at.
    """

    algorithm: str
    default: Any
    by_kid: Mapping[str, Any] | None
    audience: str | None
    issuer: str | None


def load_keys(config: Auth) -> Keys | None:
    """Read and check the configured key; None if there is none.

    Raises:
        ConfigError: with the setting at fault and what would be right.
    """
    if not config.keyed:
        for name in ("jwt_audience", "jwt_issuer"):  # whoever set one of these meant to have authentication
            if getattr(config, name):
                raise ConfigError(f"auth.{name} is set without a key; set auth.jwt_key, jwt_key_file or jwks_file too")
        return None
    if config.jwks_file:
        algorithm = _known(config.jwt_algorithm)
        default, by_kid = _read_jwks(config.jwks_file, algorithm)
    else:
        algorithm, key = _read_key(config)
        default, by_kid = _public(key), None
    return Keys(algorithm, default, by_kid, config.jwt_audience or None, config.jwt_issuer or None)


def sign_token(config: Auth, claims: Mapping[str, object]) -> str:
    """Sign claims with the configured secret or private key.

    Raises:
        ConfigError: no key is configured, or only a public one.
    """
    if not config.keyed or config.jwks_file:
        raise ConfigError("signing a token needs auth.jwt_key or auth.jwt_key_file, with a secret or a private key")
    algorithm, key = _read_key(config)
    if key is _public(key) and not isinstance(key, bytes):
        raise ConfigError(f"{_source(config)} holds only a public key; signing a token needs the private key")
    import jwt

    return jwt.encode(dict(claims), key, algorithm=algorithm)


def _known(algorithm: str) -> str:
    if algorithm not in _ALGORITHMS:
        problem = f"auth.jwt_algorithm = {algorithm!r} is not known" if algorithm else "auth.jwt_algorithm is not set"
        raise ConfigError(f"{problem}; it is one of {', '.join(_ALGORITHMS)}")
    return algorithm


def _source(config: Auth) -> str:
    return "auth.jwt_key" if config.jwt_key else "auth.jwt_key_file"


def _read_key(config: Auth) -> tuple[str, Any]:
    """Algorithm and fitting key (secret bytes, private or public key) of jwt_key or jwt_key_file."""
    source = _source(config)
    # Editors and echo end a file with a newline, which is no part of a secret.
    data = config.jwt_key.encode() or _read_file(source, config.jwt_key_file).rstrip(b"\r\n")
    is_pem = b"-----BEGIN " in data
    algorithm = _known(config.jwt_algorithm or ("" if is_pem else "HS256"))
    if algorithm not in _SECRET_BYTES:
        if not is_pem:
            raise ConfigError(
                f"{source} is not a PEM key (-----BEGIN …), but auth.jwt_algorithm = {algorithm} needs "
                f"{_ALGORITHMS[algorithm][2]}"
            )
        return algorithm, _fit(algorithm, _parse_pem(data, source), source)
    if is_pem:
        raise ConfigError(
            f"{source} is a PEM key, but auth.jwt_algorithm = {algorithm} takes a shared secret, and a public key is "
            "no secret; did you mean RS256, ES256 or EdDSA?"
        )
    return algorithm, _fit(algorithm, data, source)


def _read_file(source: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{source} = {path!r} cannot be read: {error.strerror}") from error


def _parse_pem(data: bytes, source: str) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        if b"PRIVATE KEY-----" in data:
            return serialization.load_pem_private_key(data, password=None)
        if b"-----BEGIN CERTIFICATE-----" in data:
            return x509.load_pem_x509_certificate(data).public_key()
        return serialization.load_pem_public_key(data)
    except TypeError as error:
        raise ConfigError(f"{source}: the private key is encrypted; give it unencrypted") from error
    except Exception as error:
        raise ConfigError(f"{source}: cannot be read as a PEM public key, private key or certificate") from error


def _fit(algorithm: str, key: Any, source: str) -> Any:
    """The key, once it is sure that the algorithm takes it and that it is long enough."""
    from jwt.algorithms import get_default_algorithms

    kind, _, needed = _ALGORITHMS[algorithm]
    if isinstance(key, bytes) and len(key) < _SECRET_BYTES[algorithm]:
        raise ConfigError(
            f"{source} has {len(key)} bytes; a secret for {algorithm} must have {_SECRET_BYTES[algorithm]} or more, or "
            "it can be guessed from any token: make one with `openssl rand -hex 64`"
        )
    try:
        prepared = get_default_algorithms()[algorithm].prepare_key(key)
    except Exception as error:
        held = "a key of another form" if isinstance(key, bytes) else f"another kind of key ({type(key).__name__})"
        raise ConfigError(f"auth.jwt_algorithm = {algorithm} needs {needed}, but {source} holds {held}") from error
    if kind == "RSA" and prepared.key_size < RSA_BITS:
        raise ConfigError(f"auth.jwt_algorithm = {algorithm} needs {needed}, but {source} has {prepared.key_size} bits")
    return prepared


def _public(key: Any) -> Any:
    """The public half of a private key; anything else as it is."""
    return key.public_key() if hasattr(key, "public_key") else key


def _read_jwks(path: str, algorithm: str) -> tuple[Any, dict[str, Any]]:
    """The keys of a JWK set (RFC 7517 section 5) that fit the algorithm: (the only one or None, those with a kid).

    A set may hold keys for other uses and algorithms; those are passed over, as its section 5 asks for.
    """
    source = "auth.jwks_file"
    data = _read_file(source, path)
    try:
        members = [member for member in json.loads(data)["keys"] if isinstance(member, dict)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f'{source} = {path!r} is not a JWK set, {{"keys": […]}}') from error
    import jwt

    fitting: list[Any] = []
    by_kid: dict[str, Any] = {}
    for index, member in enumerate(members):
        if not _is_for(member, algorithm):
            continue
        where = f"{source}: keys[{index}]"
        try:
            key = jwt.PyJWK(member, algorithm).key
        except Exception as error:
            raise ConfigError(f"{where} cannot be read") from error
        key = _public(_fit(algorithm, key, where))
        kid = member.get("kid")
        if kid is not None:
            if not isinstance(kid, str):
                raise ConfigError(f"{where}: kid must be a string")
            if kid in by_kid:
                raise ConfigError(f"{where}: a second key for {algorithm} with kid {kid!r}")
            by_kid[kid] = key
        fitting.append(key)
    if not fitting:
        raise ConfigError(f"{source} = {path!r} holds no key for {algorithm}, which needs {_ALGORITHMS[algorithm][2]}")
    return (fitting[0] if len(fitting) == 1 else None), by_kid


def _is_for(jwk: dict[str, Any], algorithm: str) -> bool:
    """Whether a JWK is meant for verifying this algorithm's signatures (RFC 7517 sections 4.1 to 4.4)."""
    kind, curves, _ = _ALGORITHMS[algorithm]
    operations = jwk.get("key_ops")
    return (
        jwk.get("kty") == kind
        and (curves is None or jwk.get("crv") in curves)
        and jwk.get("use", "sig") == "sig"
        and jwk.get("alg", algorithm) == algorithm
        and (operations is None or (isinstance(operations, list) and ("verify" in operations or "sign" in operations)))
    )
