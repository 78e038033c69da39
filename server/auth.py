"""Who is asking: bearer tokens (RFC 6750) that are JSON Web Tokens (RFC 7519), or nobody at all in open mode.

The key and the one algorithm come from ``server.keys``; here tokens meet them. PyJWT is imported when a key is
configured, so that open mode and the command line start without it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from heapq import heappop, heappush
from math import isfinite
from typing import TYPE_CHECKING, Any

from protocol.errors import ApiError
from protocol.fields import is_id
from protocol.queues.payload import is_reserved
from server.config import Auth, ConfigError
from server.keys import Keys, load_keys

if TYPE_CHECKING:
    from protocol.request import Request
    from server.auth_hook import AuthHook

CAPABILITIES = frozenset({"publish", "notify", "ops"})

MAX_TOKEN = 8192  # bytes; the largest head servers and proxies commonly take, and far above any sensible token
MAX_PATTERNS = 1000
LEEWAY = 1.0  # seconds, for iat and nbf: an issuer's clock may be a little ahead; exp, which ends connections, has none

# Verified tokens are remembered, by digest, so that no usable token lies about in a table. Measured on CPython 3.11,
# one of two shared cores, a token of five claims: HS256 47 µs, RS256 68, ES256 113, EdDSA 133; remembered 0.7 µs.
CACHED_TOKENS = 10_000
CACHED_SECONDS = 3600.0  # so that a user who never comes back leaves the table within the hour, exp or not

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 section 2.1
_PATTERN = re.compile(r"[A-Za-z0-9_.:@-][A-Za-z0-9_.:@*-]{0,127}")


class Patterns:
    """Compiled patterns in which ``*`` stands for any run of characters (none included).

    Matching one name is linear in the text of the patterns: parts are searched left to right and never retried,
    which is exact for globs whose only wildcard is ``*``.
    """

    __slots__ = ("_exact", "_globs", "_prefixes")

    def __init__(self, patterns: Iterable[str]) -> None:
        exact, prefixes, globs = set(), [], []
        for pattern in patterns:
            first, *rest = pattern.split("*")
            if not rest:
                exact.add(first)
            elif not any(rest):
                prefixes.append(first)
            else:
                globs.append((first, rest[:-1], rest[-1]))
        self._exact = frozenset(exact)
        self._prefixes = tuple(prefixes)
        self._globs = tuple(globs)

    def match(self, name: str) -> bool:
        if name in self._exact or name.startswith(self._prefixes):
            return True
        return any(_glob(name, *parts) for parts in self._globs)


def _glob(name: str, first: str, middle: list[str], last: str) -> bool:
    if not (name.startswith(first) and name.endswith(last)):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        found = name.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return at <= end


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a caller is, as vouched for by its token.

    Attributes:
        user: the token's ``sub``, a valid id; ``anonymous`` in open mode.
        admin: sees every job and has every capability.
        capabilities: those of ``publish``, ``notify`` and ``ops`` that were granted.
        jobs: delegated read, job ids or patterns such as ``export-*``.
        expires_at: unix seconds from which on the identity is void, or None.
        channels: channels or patterns that may be joined, of the same form as ``jobs``, or ``*`` for any; None without
            a word on it: ``Authenticator.default_channels`` then.
    """

    user: str
    admin: bool = False
    capabilities: frozenset[str] = frozenset()
    jobs: tuple[str, ...] = ()
    expires_at: float | None = None
    channels: tuple[str, ...] | None = None
    _named: Patterns = field(init=False, repr=False, compare=False)
    _joinable: Patterns | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_named", Patterns(self.jobs) if self.jobs else _NOTHING)
        object.__setattr__(self, "_joinable", None if self.channels is None else Patterns(self.channels))

    def may_read(self, job_id: str, user_id: str) -> bool:
        """Whether a job of that owner is visible: it is one's own, or delegated, or one is an admin."""
        return user_id == self.user or self.admin or self._named.match(job_id)

    def names_job(self, job_id: str) -> bool:
        """Whether the token itself delegates reading this job, whoever owns it."""
        return self._named.match(job_id)

    def may_join(self, channel: str, default: Patterns) -> bool:
        """Whether a channel may be joined; ``default`` is for identities that say nothing of channels."""
        return self.admin or (default if self._joinable is None else self._joinable).match(channel)

    def can(self, capability: str) -> bool:
        return self.admin or capability in self.capabilities


_NOTHING = Patterns(())
ANONYMOUS = Identity("anonymous", admin=True, capabilities=CAPABILITIES)


class Authenticator:
    """Finds out who a caller is: by the configured key, or by asking the application.

    Attributes:
        open: no authentication is configured: everyone is the admin ``anonymous``.
        default_channels: channels for those whose identity says nothing of any.
        hook: asks the application, if that is configured; somebody has to run it.

    Raises:
        ConfigError: a key that is missing, unreadable, too short or unfit for the algorithm.
    """

    def __init__(self, config: Auth, *, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives unix seconds."""
        self._keys = load_keys(config)
        self.open = config.open
        self.default_channels = Patterns(config.default_channels)
        self.hook: AuthHook | None = None
        if config.hook_url:
            from server.auth_hook import AuthHook

            self.hook = AuthHook(config, clock=clock)
        self._clock = clock
        self._verified: dict[bytes, tuple[float, Identity]] = {}
        # The same entries by the time they end: the heap and the table always hold the same digests.
        self._ends: list[tuple[float, bytes]] = []

    def reload(self, config: Auth) -> None:
        """Take new keys, and another hook; every caller is checked anew from here on.

        Raises:
            ConfigError: the new keys are unfit, or the change would switch authentication or the hook on or off,
                which live connections and the listening address rely on. The old keys stay in force.
        """
        keys = load_keys(config)
        if self.open != config.open or (self.hook is None) != (not config.hook_url):
            raise ConfigError("auth: turning authentication or auth.hook_url on or off needs a restart")
        if self.hook is not None:
            self.hook.reload(config)
        self._keys = keys
        self.default_channels = Patterns(config.default_channels)
        self._verified.clear()
        self._ends.clear()

    async def identify(self, request: Request) -> Identity | None:
        """The caller's identity, or None if the request carries no credential at all.

        The first of these that is present counts, good or bad: ``Authorization: Bearer``, the WebSocket subprotocol
        ``bearer.<JWT>``, the query parameter ``access_token``, the cookie ``statuswire_token``; after them, or without
        a key instead of them, what the auth hook says. In open mode they are not looked at.

        Raises:
            ApiError: 401 ``invalid_token`` or ``token_expired``, with ``WWW-Authenticate`` (RFC 6750 section 3); what
                the hook says, see ``AuthHook.ask``.
        """
        if self.open:
            return ANONYMOUS
        if self.hook is None:
            token = credential(request)
            return None if token is None else self.verify(token)
        token = bearer_of(request) or _other_credential(request)
        if token is None:
            return await self.hook.identify(request)
        return await self.introduce(token, request.headers.get("cookie"))

    async def introduce(self, token: str, cookie: str | None = None) -> Identity:
        """The identity a token vouches for; without a key of our own, the application is asked about it.

        Args:
            cookie: the caller's, for the application.

        Raises:
            ApiError: see ``identify``.
        """
        if self._keys is None and self.hook is not None:
            if len(token) > MAX_TOKEN or not _TOKEN.fullmatch(token):
                raise bad_token()
            credentials = {"authorization": f"Bearer {token}"}
            return await self.hook.ask(credentials | {"cookie": cookie} if cookie else credentials)
        return self.verify(token)

    def verify(self, token: str) -> Identity:
        """The identity a token vouches for; ``anonymous`` in open mode, whatever the token.

        Raises:
            ApiError: 401 ``invalid_token``, or ``token_expired`` for a genuine token past its ``exp``. Nothing else,
                whatever the token.
        """
        if self.open:
            return ANONYMOUS
        if len(token) > MAX_TOKEN:
            raise bad_token(f"the token is longer than {MAX_TOKEN} bytes")
        if self._keys is None or not token.isascii():
            raise bad_token()
        digest = sha256(token.encode()).digest()
        now = self._clock()
        kept = self._verified.get(digest)
        if kept is not None and now < kept[0]:
            return kept[1]
        self._forget(now)
        identity = _identity(_claims(token, self._keys), now)
        until = now + CACHED_SECONDS if identity.expires_at is None else min(identity.expires_at, now + CACHED_SECONDS)
        self._verified[digest] = (until, identity)
        heappush(self._ends, (until, digest))
        return identity

    @property
    def remembered(self) -> int:
        """How many verified tokens are held."""
        return len(self._verified)

    def _forget(self, now: float) -> None:
        """Drop what has ended, and what ends soonest if there is no room for one more."""
        ends = self._ends
        while ends and (ends[0][0] <= now or len(ends) >= CACHED_TOKENS):
            del self._verified[heappop(ends)[1]]


def unauthorized() -> ApiError:
    """401 for a request without any credential (RFC 6750 section 3: no error code in the challenge then)."""
    return ApiError(
        401,
        "unauthorized",
        "a token is needed: send it as 'Authorization: Bearer <token>'",
        headers=(("WWW-Authenticate", "Bearer"),),
    )


def bad_token(message: str = "the token is not valid", code: str = "invalid_token") -> ApiError:
    """401 for a credential that does not hold (RFC 6750 section 3.1)."""
    return ApiError(401, code, message, headers=(("WWW-Authenticate", 'Bearer error="invalid_token"'),))


def credential(request: Request) -> str | None:
    """The token a request presents, or None.

    Raises:
        ApiError: 401 for an ``Authorization`` header that is not ``Bearer <token>`` (RFC 6750 section 2.1), unless it
            is of another scheme, for a proxy in front of us, and there is a token besides.
    """
    bearer = bearer_of(request)
    if bearer is not None:
        return bearer
    authorization = request.headers.get("authorization")
    scheme, _, token = (authorization or "").strip().partition(" ")
    # "Basic …" and the like are for somebody else, a proxy in front of us; a word alone is a token without its scheme.
    of_another_scheme = bool(token) and scheme.lower() != "bearer"
    other = _other_credential(request) if authorization is None or of_another_scheme else None
    if authorization is not None and other is None:
        raise bad_token("Authorization must have the form 'Bearer <token>'")
    return other


def bearer_of(request: Request) -> str | None:
    """The token of ``Authorization: Bearer <token>``, or None."""
    scheme, _, token = request.headers.get("authorization", "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _other_credential(request: Request) -> str | None:
    """The token that stands elsewhere than in ``Authorization``."""
    for offered in request.headers.get("sec-websocket-protocol", "").split(","):
        word = offered.strip()
        if word.startswith("bearer."):
            return word[len("bearer.") :]
    token_parameter = request.query.get("access_token")
    if token_parameter is not None:
        return token_parameter
    # An empty cookie is what a log-out leaves behind.
    return request.cookies.get("statuswire_token") or None


# --- tokens -------------------------------------------------------------------------------------------------------


def _claims(token: str, keys: Keys) -> dict[str, Any]:
    """The claims of a token with a good signature, audience and issuer.

    PyJWT promises its own exception classes, yet others have come out of it for odd tokens and keys: whatever a
    token makes it raise, the token is bad.
    """
    import jwt

    try:
        key = keys.default
        if keys.by_kid is not None:
            kid = jwt.get_unverified_header(token).get("kid")
            if kid is not None:
                key = keys.by_kid.get(kid)
        if key is None:
            raise bad_token("the token names no key that is known here")
        return jwt.decode(
            token,
            key,
            algorithms=[keys.algorithm],
            audience=keys.audience,
            issuer=keys.issuer,
            # The times are checked here: PyJWT takes "12" and true for numbers, and has one leeway for all three.
            options={"verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
    except ApiError:
        raise
    except Exception as error:
        # The signature held when these two are raised, so the bearer may know.
        if isinstance(error, jwt.InvalidAudienceError | jwt.InvalidIssuerError | jwt.MissingRequiredClaimError):
            raise bad_token("the token was made for another audience or by another issuer") from error
        raise bad_token() from error


def _identity(claims: dict[str, Any], now: float) -> Identity:
    """Read the claims of a genuine token; ``now`` in unix seconds."""
    expires_at = _numeric_date(claims, "exp")
    if expires_at is not None and expires_at <= now:
        raise bad_token("the token has expired", "token_expired")
    for name in ("nbf", "iat"):
        moment = _numeric_date(claims, name)
        if moment is not None and moment > now + LEEWAY:
            raise bad_token(f"the token is not valid yet ({name})")
    user = claims.get("sub")
    if not isinstance(user, str) or not is_id(user):
        raise bad_token("the token's sub must be 1 to 128 characters of A-Z a-z 0-9 _ . : @ -")
    if is_reserved(user):
        raise bad_token("the token's sub must not begin with queue:, which owns what has no owner")
    return Identity(
        user=user,
        admin=claims.get("admin") is True,
        capabilities=CAPABILITIES.intersection(_strings(claims, "capabilities")),
        jobs=_patterns(claims, "jobs"),
        expires_at=expires_at,
        channels=_patterns(claims, "channels") if "channels" in claims else None,
    )


def _numeric_date(claims: dict[str, Any], name: str) -> float | None:
    """RFC 7519 section 2, NumericDate: a JSON number, seconds since 1970."""
    if name not in claims:
        return None
    value = claims[name]
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise bad_token(f"the token's {name} must be a number of seconds")


def _strings(claims: dict[str, Any], name: str) -> list[str]:
    value = claims.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise bad_token(f"the token's {name} must be a list of strings")
    return value


def _patterns(claims: dict[str, Any], name: str) -> tuple[str, ...]:
    return patterns_of(_strings(claims, name), name)


def patterns_of(texts: Iterable[str], name: str) -> tuple[str, ...]:
    """Check patterns of ids.

    Raises:
        ApiError: 401 ``invalid_token``: too many, or one that is no pattern.
    """
    patterns = tuple(texts)
    if len(patterns) > MAX_PATTERNS:
        raise bad_token(f"the token's {name} must be at most {MAX_PATTERNS}")
    if not all(_PATTERN.fullmatch(pattern) or (pattern == "*" and name == "channels") for pattern in patterns):
        raise bad_token(f"the token's {name} must be ids of at most 128 characters, with * anywhere but in front")
    return patterns
