"""Who may do what, against a real server: tokens, owners, admins, delegates, capabilities, hosts, origins, rates."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from server.routes.page import FILES
from tests.support import ADMIN, AUTH, SECRET, WORKER, Answer, InProcess, bearer, in_seconds, server, token, until

JOBS = "/api/v2/jobs"
APP = "https://app.example"


async def test_what_a_proxy_would_say_of_host_and_scheme_is_never_believed() -> None:
    """Only ``X-Forwarded-For`` is read, and that from trusted proxies alone."""
    said = {"X-Forwarded-Host": "localhost", "X-Forwarded-Proto": "https", "Forwarded": "host=localhost;proto=https"}
    async with server(server={"trusted_proxies": ["127.0.0.1"]}) as at:
        answer = await at.ask("GET", JOBS, headers=said, host="evil.example")
        assert (answer.status, answer.error) == (403, "host_not_allowed")
        page = {"Origin": "https://evil.example", **said, "X-Forwarded-Host": "evil.example"}
        answer = await at.post(JOBS, {}, page)
        assert (answer.status, answer.error) == (403, "origin_not_allowed")
        answer = await at.post(JOBS, {"userId": "alice"}, said)
        assert answer.headers["location"].startswith("/api/v2/jobs/")


# --- tokens -------------------------------------------------------------------------------------------------------


async def test_without_a_token_it_is_401_with_a_challenge() -> None:
    async with server(auth=AUTH) as at:
        for method, target in (
            ("GET", JOBS),
            ("GET", f"{JOBS}/j1"),
            ("HEAD", f"{JOBS}/j1"),
            ("GET", f"{JOBS}/j1/history"),
            ("GET", f"{JOBS}/poll"),
            ("GET", f"{JOBS}/stream"),
            ("POST", JOBS),
            ("POST", f"{JOBS}/j1/updates"),
            ("POST", f"{JOBS}/j1/cancel"),
            ("POST", "/api/v2/updates"),
            ("DELETE", f"{JOBS}/j1"),
        ):
            answer = await at.ask(method, target, {} if method == "POST" else None)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), target
            if method != "HEAD":
                assert answer.error == "unauthorized"


async def test_health_and_the_page_are_public() -> None:
    async with server(auth=AUTH) as at:
        for target in ("/health", "/ready", "/", *(f"/{name}" for name in FILES)):
            assert (await at.get(target)).status == 200, target


async def test_the_client_may_be_loaded_from_listed_origins_and_is_sent_once() -> None:
    page = {"Origin": "https://app.example.com"}
    async with server(auth=AUTH, cors={"origins": [page["Origin"]]}, server={"base_path": "/status"}) as at:
        answer = await at.get("/status/client.js", page)
        assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
        assert answer.headers["access-control-allow-origin"] == page["Origin"]
        assert answer.headers["cache-control"] == "no-cache"
        again = await at.get("/status/client.js", {**page, "If-None-Match": answer.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
        assert "access-control-allow-origin" not in (await at.get("/status/client.js")).headers


@pytest.mark.parametrize(
    ("name", "headers", "code"),
    [
        ("scheme", {"Authorization": "Basic dXNlcjpwYXNz"}, "invalid_token"),
        ("bare", {"Authorization": "Bearer"}, "invalid_token"),
        ("garbage", {"Authorization": "Bearer x.y.z"}, "invalid_token"),
        ("expired", bearer("alice", exp=in_seconds(-5)), "token_expired"),
        ("not yet", bearer("alice", nbf=in_seconds(86_400)), "invalid_token"),
        ("bad exp", bearer("alice", exp="tomorrow"), "invalid_token"),
        ("no sub", {"Authorization": "Bearer " + jwt.encode({"admin": True}, SECRET)}, "invalid_token"),
        ("bad sub", bearer("a b"), "invalid_token"),
        ("other key", {"Authorization": "Bearer " + jwt.encode({"sub": "a"}, SECRET[::-1])}, "invalid_token"),
        ("other hash", {"Authorization": "Bearer " + jwt.encode({"sub": "a"}, SECRET * 2, "HS512")}, "invalid_token"),
        ("none", {"Authorization": "Bearer " + jwt.encode({"sub": "a"}, None, "none")}, "invalid_token"),
        ("long", {"Authorization": "Bearer " + "x" * 9000}, "invalid_token"),
        ("cookie", {"Cookie": "statuswire_token=x.y.z"}, "invalid_token"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_token_is_401_and_says_no_more(name: str, headers: dict[str, str], code: str) -> None:
    async with server(auth=AUTH) as at:
        answer = await at.get(JOBS, headers)
        assert (answer.status, answer.error) == (401, code), name
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'


async def test_a_token_comes_by_header_query_or_cookie_and_the_first_counts() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("j1", WORKER, userId="alice")
        good, bad = token("alice"), "x.y.z"
        cookie = {"Cookie": f"theme=dark; statuswire_token={good}"}
        for target, headers, status in (
            (JOBS, {"Authorization": f"bearer {good}"}, 200),
            (f"{JOBS}?access_token={good}", {}, 200),
            (JOBS, cookie, 200),
            (f"{JOBS}?access_token={good}", {"Authorization": f"Bearer {bad}"}, 401),
            (f"{JOBS}?access_token={bad}", {"Authorization": f"Bearer {good}"}, 200),
            (f"{JOBS}?access_token={bad}", cookie, 401),
            (f"{JOBS}?access_token=", cookie, 401),
            (JOBS, {"Cookie": "statuswire_token="}, 401),
        ):
            answer = await at.get(target, headers)
            assert answer.status == status, (target, headers)
            if status == 200:
                assert [job["jobId"] for job in answer.json["jobs"]] == ["j1"]


async def test_a_token_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with server(auth=AUTH) as at:
        secret = token("alice")
        for target, headers in (
            (f"{JOBS}?access_token={secret}", {}),
            (f"/nowhere?access_token={secret}", {}),
            (f"{JOBS}/j1?access_token={secret}&access_token={secret}", {}),
            (JOBS, {"Authorization": f"Bearer {secret}x"}),
            (JOBS, {"Authorization": f"Bearer {secret}\x01"}),
            (f"{JOBS}?access_token={secret}#x", {}),
        ):
            await at.get(target, headers)
    seen = [str(record.__dict__) for record in caplog.records if record.getMessage() == "request"]
    assert len(seen) == 6
    assert secret.rpartition(".")[2] not in "".join(seen)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
@pytest.mark.parametrize("form", ["pem", "jwks"])
async def test_public_key_algorithms(algorithm: str, form: str, tmp_path: Path) -> None:
    private: Any
    if algorithm == "RS256":
        private = rsa.generate_private_key(65537, 2048)
    else:
        private = (
            ec.generate_private_key(ec.SECP256R1()) if algorithm == "ES256" else ed25519.Ed25519PrivateKey.generate()
        )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path = tmp_path / "key"
    if form == "pem":
        path.write_bytes(public)
    else:
        implementation = jwt.get_algorithm_by_name(algorithm)
        jwk = json.loads(implementation.to_jwk(private.public_key()))  # type: ignore[attr-defined]
        path.write_text(json.dumps({"keys": [jwk | {"kid": "k1", "use": "sig"}]}))
    name = "jwt_key_file" if form == "pem" else "jwks_file"
    async with server(auth={"jwt_algorithm": algorithm, name: str(path)}) as at:
        good = jwt.encode({"sub": "alice"}, private, algorithm, headers={"kid": "k1"})
        assert (await at.get(JOBS, {"Authorization": f"Bearer {good}"})).status == 200
        # The old trick: the public key as the secret of an HMAC. PyJWT refuses to make one, so by hand.
        forged = _hs256_with(public)
        assert (await at.get(JOBS, {"Authorization": f"Bearer {forged}"})).error == "invalid_token"


def _hs256_with(secret: bytes) -> str:
    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    signed = ".".join(encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": "alice"}))
    return f"{signed}.{encode(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


# --- owners, admins, delegates ------------------------------------------------------------------------------------


async def test_who_sees_which_job() -> None:
    async with server(auth=AUTH) as at:
        for job_id in ("export-1", "report-1"):
            await at.publish(job_id, WORKER, userId="alice")
        for headers, export, report in (
            (bearer("alice"), 200, 200),
            (ADMIN, 200, 200),
            (bearer("bob"), 404, 404),
            (WORKER, 404, 404),
            (bearer("bob", capabilities=["publish", "notify", "ops"]), 404, 404),
            (bearer("bob", jobs=["export-*"]), 200, 404),
            (bearer("bob", jobs=["report-1"]), 404, 200),
            (bearer("bob", admin="true"), 404, 404),
            (bearer("bob", admin=1), 404, 404),
        ):
            found = [(await at.get(f"{JOBS}/{job_id}", headers)).status for job_id in ("export-1", "report-1")]
            assert found == [export, report], headers


async def test_a_delegate_reads_and_nothing_else() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("export-1", WORKER, userId="alice")
        delegate = bearer("bob", jobs=["export-*"])
        assert (await at.get(f"{JOBS}/export-1/history", delegate)).status == 200
        polled = (await at.get(f"{JOBS}/poll?timeout=0&jobIds=export-1", delegate)).json["updates"]
        assert [update["jobId"] for update in polled] == ["export-1"]
        assert (await at.post(f"{JOBS}/export-1/updates", {"progress": 1}, delegate)).status == 403
        assert (await at.ask("DELETE", f"{JOBS}/export-1", headers=delegate)).status == 403


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", JOBS, {"jobId": "new"}),
        ("POST", f"{JOBS}/j1/updates", {"progress": 5}),
        ("POST", "/api/v2/updates", [{"jobId": "j1", "progress": 5}]),
        ("DELETE", f"{JOBS}/j1", None),
    ],
)
async def test_publishing_needs_the_capability(method: str, target: str, body: object) -> None:
    async with server(auth=AUTH) as at:
        await at.publish("j1", WORKER, userId="alice")
        for headers in (bearer("alice"), bearer("alice", capabilities=["notify", "ops", "Publish"])):
            answer = await at.ask(method, target, body, headers)
            assert (answer.status, answer.error) == (403, "forbidden")
            assert "publish" in answer.json["error"]["message"]
        assert (await at.get(f"{JOBS}/j1", ADMIN)).json["version"] == 1
        assert (await at.get(f"{JOBS}/new", ADMIN)).status == 404
        assert (await at.ask(method, target, body, ADMIN)).status < 300, "an admin has every capability"


async def test_all_jobs_are_for_admins_on_the_list_too() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("j1", WORKER, userId="alice")
        answer = await at.get(f"{JOBS}?all=1", bearer("alice"))
        assert (answer.status, answer.error, answer.json["error"]["field"]) == (403, "forbidden", "all")
        assert (await at.get(f"{JOBS}?all=zz", ADMIN)).status == 400
        for query, headers in (("all=0", bearer("alice")), ("all=1", ADMIN)):
            assert [job["jobId"] for job in (await at.get(f"{JOBS}?{query}", headers)).json["jobs"]] == ["j1"]


async def test_open_mode_takes_everyone_for_an_admin_and_looks_at_no_token() -> None:
    async with server() as at:
        await at.publish("j1", userId="alice")
        for headers in ({}, bearer("bob"), {"Authorization": "Basic x"}):
            assert (await at.get(f"{JOBS}/j1", headers)).status == 200
        assert (await at.get(f"{JOBS}?userId=alice")).status == 200
        assert (await at.post(f"{JOBS}/j1/cancel", {})).status == 202


async def test_404_and_405_come_before_401() -> None:
    async with server(auth=AUTH) as at:
        assert (await at.get("/api/v2/nothing")).error == "not_found"
        assert (await at.ask("PUT", JOBS)).error == "method_not_allowed"


# --- hosts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1:80", "127.1.2.3", "[::1]:3000", "App.LocalHost"]
)
async def test_open_mode_answers_to_loopback_names(host: str) -> None:
    async with server() as at:
        assert (await at.ask("GET", "/health", host=host)).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0"]
)
async def test_open_mode_refuses_a_foreign_host(host: str) -> None:
    async with server() as at:
        for method, target in (("GET", "/"), ("GET", JOBS), ("POST", JOBS), ("OPTIONS", JOBS)):
            answer = await at.ask(method, target, {} if method == "POST" else None, host=host)
            assert (answer.status, answer.error) == (403, "host_not_allowed")
        # An absolute target replaces Host (RFC 9112 section 3.2.2), both ways.
        assert (await at.ask("GET", f"http://{host}/health")).status == 403
        assert (await at.ask("GET", "http://localhost/health", host=host)).status == 200
    async with server(auth=AUTH) as at:
        assert (await at.ask("GET", "/health", host=host)).status == 200


# --- origins ------------------------------------------------------------------------------------------------------


async def test_a_page_from_elsewhere_changes_nothing_and_reads_nothing() -> None:
    async with server() as at:
        await at.publish("j1", userId="alice")
        for origin in ("https://evil.example", "null", "http://localhost:1", "https://localhost.evil.example"):
            headers = {"Origin": origin}
            for method, target in (("POST", JOBS), ("DELETE", f"{JOBS}/j1"), ("POST", f"{JOBS}/j1/cancel")):
                answer = await at.ask(method, target, {} if method == "POST" else None, headers)
                assert (answer.status, answer.error) == (403, "origin_not_allowed"), (origin, method)
            read = await at.get(JOBS, headers)
            assert not any(name.startswith("access-control") for name in read.headers), "the browser keeps it back"
        assert len((await at.get(JOBS)).json["jobs"]) == 1


async def test_our_own_pages_may_do_everything() -> None:
    async with server() as at:
        own = {"Origin": f"http://localhost:{at.port}"}
        answer = await at.ask("POST", JOBS, {"jobId": "j1"}, own, host=f"localhost:{at.port}")
        assert answer.status == 201


async def test_a_listed_origin_is_echoed_with_every_answer() -> None:
    async with server(auth=AUTH, cors={"origins": f"{APP}:443/,http://localhost:5173"}) as at:
        page = {"Origin": APP}
        for method, target, headers, status in (
            ("GET", JOBS, bearer("alice"), 200),
            ("GET", JOBS, {}, 401),
            ("GET", "/nowhere", {}, 404),
            ("PATCH", JOBS, {}, 405),
            ("POST", JOBS, bearer("alice"), 403),
            ("GET", "/health", {"Cookie": "a=b"}, 200),
        ):
            answer = await at.ask(method, target, {} if method == "POST" else None, headers | page)
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] == APP
            assert answer.headers["access-control-allow-credentials"] == "true"
            assert answer.headers["vary"] == "Origin"
            exposed = answer.headers["access-control-expose-headers"]
            assert {"etag", "retry-after", "x-request-id", "x-job-status"} <= set(exposed.split(", "))
        stranger = await at.get("/health", {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
        assert stranger.headers["vary"] == "Origin"
        assert (await at.get("/health")).headers["vary"] == "Origin"


async def test_preflight_allows_the_methods_of_the_path() -> None:
    async with server(auth=AUTH, cors={"origins": APP}) as at:
        headers = {
            "Origin": APP,
            "Access-Control-Request-Method": "DELETE",
            "Access-Control-Request-Headers": "authorization",
        }
        for target, methods in (
            (JOBS, "GET, POST, HEAD, OPTIONS"),
            (f"{JOBS}/j1", "GET, DELETE, HEAD, OPTIONS"),
            (f"{JOBS}/stream", "GET, OPTIONS"),
            ("/api/v2/updates", "POST, OPTIONS"),
        ):
            answer = await at.ask("OPTIONS", target, headers=headers)
            assert (answer.status, answer.body) == (204, b"")
            assert answer.headers["access-control-allow-methods"] == methods
            assert answer.headers["access-control-allow-origin"] == APP
            assert answer.headers["access-control-allow-credentials"] == "true"
            assert answer.headers["access-control-max-age"] == "600"
            allowed = "authorization, content-type, idempotency-key, last-event-id, if-none-match"
            assert answer.headers["access-control-allow-headers"] == allowed
        stranger = await at.ask("OPTIONS", JOBS, headers=headers | {"Origin": "https://evil.example"})
        assert stranger.status == 204
        assert "access-control-allow-origin" not in stranger.headers
        plain = await at.ask("OPTIONS", JOBS)
        assert (plain.status, plain.headers["allow"]) == (204, "GET, POST, HEAD, OPTIONS")
        assert "access-control-allow-methods" not in plain.headers


async def test_any_page_may_be_allowed_but_never_with_cookies() -> None:
    async with server(auth=AUTH, cors={"origins": "*"}) as at:
        page = {"Origin": "https://any.example"}
        answer = await at.get(JOBS, page | bearer("alice"))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert "access-control-allow-credentials" not in answer.headers
        cookie = {"Cookie": f"statuswire_token={token('w', capabilities=['publish'])}"}
        assert (await at.post(JOBS, {}, page | cookie)).error == "origin_not_allowed"


# --- rates --------------------------------------------------------------------------------------------------------


def refused(answer: Answer) -> None:
    assert (answer.status, answer.error) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["connection"] == "close"


async def test_connects_per_second_are_counted_per_address() -> None:
    async with server(limits={"connects_per_second": 0.01}) as at, at.connect() as first:
        assert (await first.request("GET", JOBS)).status == 200
        refused(await at.get(JOBS))
        assert (await at.get("/health")).status == 200, "health is always answered"
        stream = await at.get(f"{JOBS}/stream", {"Accept": "text/event-stream"})
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
        assert stream.body.startswith(b"retry: ")
        assert b'"code":"try_later"' in stream.body
        assert (await first.request("GET", JOBS)).status == 200, "who is in stays in"


async def test_behind_a_proxy_connects_are_counted_for_the_client() -> None:
    async with server(limits={"connects_per_second": 0.01}, server={"trusted_proxies": "127.0.0.1"}) as at:
        assert (await at.get(JOBS)).status == 200
        assert (await at.get(JOBS)).status == 200, "the proxy itself is not limited"
        one, two = {"X-Forwarded-For": "203.0.113.1"}, {"X-Forwarded-For": "9.9.9.9, 203.0.113.2"}
        assert (await at.get(JOBS, one)).status == 200
        refused(await at.get(JOBS, one))
        assert (await at.get(JOBS, two)).status == 200
        refused(await at.get(JOBS, two | {"X-Forwarded-For": "8.8.8.8, 203.0.113.2"}))


async def test_nobody_may_claim_an_address_who_is_no_proxy() -> None:
    async with server(limits={"connects_per_second": 0.01}) as at:
        assert (await at.get(JOBS, {"X-Forwarded-For": "203.0.113.1"})).status == 200
        refused(await at.get(JOBS, {"X-Forwarded-For": "203.0.113.2"}))


async def test_live_connections_per_user() -> None:
    async with server(auth=AUTH, limits={"connections_per_user": 1}) as at, at.connect() as live:
        await open_stream(at, live, bearer("alice"))
        answer = await at.get(f"{JOBS}/stream", bearer("alice"))
        assert (answer.status, answer.error) == (429, "rate_limited")
        turned = await at.get(f"{JOBS}/stream", bearer("alice") | {"Accept": "text/event-stream"})
        assert b"try_later" in turned.body
        async with at.connect() as other:
            await open_stream(at, other, bearer("bob"))
        await live.aclose()
        await until(lambda: not at.node.streams)
        async with at.connect() as again:
            await open_stream(at, again, bearer("alice"))


async def open_stream(at: InProcess, http: Any, headers: dict[str, str]) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    await http.send(f"GET {JOBS}/stream HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
    status, _ = await http.head()
    assert status == 200
