"""More of what is fuzzed: who is asking and from where, and what other systems and other times have written.

As in ``tests.fuzz.targets``, an exception out of a target is a finding.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import ipaddress
import json
import os
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

import msgspec

from protocol import notice, polling, watch
from protocol.errors import ApiError
from protocol.fields import is_id
from protocol.proxy import MAX_LINE, MAX_REST, Header, ProxyError, parse_header
from protocol.request import Request, parse_query
from server.auth import CAPABILITIES, Authenticator, Identity
from server.auth_hook import _DECODER, _identity
from server.brokers.spool_entry import decode_entry, encode_entry, entry_of, operation_of
from server.config import Auth, ConfigError, Webhook
from server.keys import load_keys
from server.origins import check_host, origin_allowed, parse_origins
from server.routes.webhooks import _notice
from server.transfer.lines import Reader, TransferError

SECRET: Final = "a secret of the fuzzer, 32 bytes or more"
NOW_S: Final = 1_700_000_000.0


def proxy(data: bytes) -> None:
    """PROXY headers: what is found in a part is found in all that begins with it, and what is found is an address."""
    data = data[:600]
    settled: object = None
    for size in range(len(data) + 1):
        found = _header(data[:size])
        assert settled is None or found == settled, (settled, found, size)
        settled = found
    if isinstance(settled, Header):
        assert settled.size <= len(data)
        assert settled.size <= max(MAX_LINE, 16 + MAX_REST)
        assert settled.source is None or str(ipaddress.ip_address(settled.source)) == settled.source
    else:
        assert settled or len(data) < 16 + MAX_REST


def _header(data: bytes) -> Header | str | None:
    try:
        return parse_header(data)
    except ProxyError:
        return "refused"


# Who is asking


def tokens(data: bytes) -> None:
    """Tokens as they come, with claims or a header of anybody's that are signed, and what an application says."""
    flag, data = (data[0] if data else 0), data[1:]
    authenticator = Authenticator(Auth(jwt_key=SECRET), clock=lambda: NOW_S)
    try:
        match flag % 4:
            case 0:
                found = authenticator.verify(data.decode("latin-1"))
            case 1:
                found = authenticator.verify(_signed(b'{"alg":"HS256"}', data))
            case 2:
                found = authenticator.verify(_signed(data, b'{"sub":"a"}'))
                assert json.loads(data)["alg"] == "HS256", "the algorithm is not for the token to choose"
            case _:
                try:
                    found = _identity(_DECODER.decode(data))
                except (ValueError, RecursionError):
                    return
    except ApiError as error:
        assert error.status == 401
        return
    _fit(found)
    assert flag % 4 == 3 or found.expires_at is None or found.expires_at > NOW_S


def _fit(identity: Identity) -> None:
    assert is_id(identity.user)
    assert identity.capabilities <= CAPABILITIES
    assert identity.admin in (True, False)
    assert identity.may_read("job", identity.user)
    assert identity.may_read("job", "another") in (True, False)
    assert identity.may_join("channel", Authenticator(Auth()).default_channels) in (True, False)


def _signed(header: bytes, claims: bytes) -> str:
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, claims))
    signature = hmac.digest(SECRET.encode(), text, hashlib.sha256)
    return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


# A file that is on no disk.
_KEYS: Final = Path(f"/proc/self/fd/{os.memfd_create('keys')}")


def keys(data: bytes) -> None:
    """Files of keys, PEM and JWK sets: keys that fit, or a reason in words."""
    flag, data = (data[0] if data else 0), data[1:]
    algorithm = ("HS256", "RS256", "ES256", "EdDSA")[flag % 4]
    _KEYS.write_bytes(data)
    auth = {"jwks_file" if flag & 4 else "jwt_key_file": str(_KEYS)}
    try:
        found = load_keys(msgspec.convert({**auth, "jwt_algorithm": algorithm}, Auth))
    except ConfigError as error:
        assert str(error)
    else:
        assert found is not None
        assert found.algorithm == algorithm


def origins(data: bytes) -> None:
    """Pages and hosts: who is of the same origin has the same host, and who is local names loopback."""
    origin, _, rest = data.decode("latin-1").partition("\n")
    host, _, listed = rest.partition("\n")
    headers = {"origin": origin, "host": host}
    request = Request("POST", "/", "/", {}, headers)
    if origin_allowed(request, frozenset()):
        assert urlsplit(origin).hostname == urlsplit(f"//{host}").hostname, headers
    try:
        check_host(request, open_mode=True)
    except ApiError as error:
        assert error.status == 403
    else:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        assert name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback, host
    try:
        allowed = parse_origins(listed.split("\n"))
    except ConfigError:
        return
    for each in allowed - {"*", "null"}:
        assert origin_allowed(Request("POST", "/", "/", {}, {"origin": each, "host": "h"}), allowed)


# What is asked


def parameters(data: bytes) -> None:
    """Everything that is read of a query."""
    try:
        query = parse_query("/?" + data.decode("latin-1"))
    except ApiError as error:
        assert error.status == 400
        return
    for read in (
        watch.parse_watch,
        watch.wants_all,
        polling.parse_timeout,
        polling.parse_client_id,
        notice.parse_channels,
        notice.parse_username,
    ):
        try:
            found = cast(Any, read)(query)
        except ApiError as error:
            assert error.status == 400
            continue
        if isinstance(found, watch.Watch):
            assert all(map(is_id, found.job_ids or ()))
        elif read is polling.parse_timeout:
            assert 0 <= found <= polling.MAX_TIMEOUT_S


def notices(data: bytes) -> None:
    """Notifications, and what other systems say that becomes one."""
    flag, data = (data[0] if data else 0), data[1:]
    target = ("user", "users", "channel", "channels", "client", "broadcast")[flag >> 1 & 7 if flag >> 1 & 7 < 6 else 0]
    webhook = msgspec.convert(
        {"secret": SECRET, "event": "e", "target": target, "target_id": "/to", "data": "/data", "store": False}, Webhook
    )
    try:
        found = notice.decode_notice(data)[0] if flag & 1 else _notice(webhook, data)
    except ApiError as error:
        assert error.status in (400, 422)
        return
    entry = found.entry(1, int(NOW_S * 1000))
    assert entry.targets
    assert notice.targets_of(notice.target_of(entry.targets)) == entry.targets
    said = msgspec.json.decode(notice.event_data(entry))
    assert said["data"] == msgspec.json.decode(found.data)
    assert "\n" not in found.event


# What was written at another time


def exports(data: bytes) -> None:
    """The lines of an export: everything that is in them, or a reason in words."""
    try:
        reader = Reader(io.BytesIO(data))
        for _ in reader.items():
            pass
    except TransferError as error:
        assert str(error)


def spooled(data: bytes) -> None:
    """Operations on disk: what is understood is kept again as it was."""
    try:
        operation = operation_of(decode_entry(data))
        entry = entry_of(operation, None)
    except (msgspec.MsgspecError, UnicodeError, ApiError):
        return
    again = operation_of(decode_entry(encode_entry(entry)))
    assert entry_of(again, None) == entry
