"""Keys and tokens, genuine and forged, and authenticators that stand at one moment."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from protocol.errors import ApiError
from server.auth import Authenticator
from server.config import Auth

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


def jwk(kind: str, kid: object = None, private: bool = False, **members: Any) -> dict[str, object]:
    from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

    key = private_key(kind) if private else private_key(kind).public_key()
    maker: Any = {"R": RSAAlgorithm, "P": RSAAlgorithm, "ES": ECAlgorithm, "Ed": OKPAlgorithm}
    maker = maker.get(kind[:2]) or maker[kind[:1]]
    made: dict[str, object] = maker.to_jwk(key, as_dict=True)
    made.pop("key_ops", None)
    return {**made, **({} if kid is None else {"kid": kid}), **members}
