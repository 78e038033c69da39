"""Certificates and keys: files that do not fit, that change, that commands trust and workers share."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from server import tls
from server.config import ConfigError, Server
from tests import certificates
from tests.certificates import Certificates
from tests.integration.running import STATUSWIRE, clean_environment
from tests.producer.workers import delivered
from tests.redis_servers import RedisServer
from tests.server.tls_peers import Peer, in_thread
from tests.streams import session
from tests.support import PATIENCE_S, Address, server, spawned, write_config


def refusal(**keys: str) -> str:
    with pytest.raises(ConfigError) as caught:
        tls.load_context(Server(**keys))
    return str(caught.value)


def test_files_that_do_not_fit(issued: Certificates, tmp_path: Path) -> None:
    other = certificates.make(tmp_path)
    cert, key = str(issued.cert), str(issued.key)
    assert "is not the key of the certificate" in refusal(tls_cert=cert, tls_key=str(other.key))
    assert "No such file" in refusal(tls_cert=cert, tls_key="nowhere.pem")
    assert refusal(tls_cert="nowhere.pem").startswith("server.tls_cert = 'nowhere.pem': No such file")
    assert "expected a certificate" in refusal(tls_cert=key, tls_key=key)
    assert "expected a certificate" in refusal(tls_cert=cert)  # which holds no key
    encrypted = tmp_path / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", key, "-out", str(encrypted), "-passout", "pass:secret"], check=True
    )
    assert "the key is encrypted" in refusal(tls_cert=cert, tls_key=str(encrypted))
    both = tmp_path / "both.pem"
    both.write_bytes(issued.key.read_bytes() + issued.cert.read_bytes())
    assert tls.load_context(Server(tls_cert=str(both))) is not None
    assert tls.load_context(Server()) is None


def served_certificate(at: Address) -> bytes:
    assert at.tls is not None
    with socket.create_connection(("127.0.0.1", at.port), PATIENCE_S) as sock:
        peer = Peer(sock, at.tls).shake_hands()
        found = peer.tls.getpeercert(binary_form=True)
        assert found is not None
        return found


@pytest.mark.slow
async def test_reload_takes_new_files_and_keeps_the_old_if_they_are_bad(tmp_path: Path) -> None:
    made = certificates.make(tmp_path)
    async with spawned(tmp_path, tls=made.trust, server=made.table, store={"url": "memory:"}) as at:
        assert at.start_line.startswith("statuswire listening on https://127.0.0.1:")
        first = await in_thread(served_certificate, at)
        async with session(at) as ws:
            made.issue()
            at.signal(signal.SIGHUP)
            await at.logged("reloaded")
            second = await in_thread(served_certificate, at)
            assert second != first
            certificate = made.cert.read_bytes()
            made.issue()
            made.cert.write_bytes(certificate)  # the new key with the old certificate: caught half-way
            at.signal(signal.SIGHUP)
            await at.logged("reload_failed")
            assert "is not the key of the certificate" in at.log()
            assert await in_thread(served_certificate, at) == second
            write_config(tmp_path, {"server": {"port": at.port}, "store": {"url": "memory:"}})
            at.signal(signal.SIGHUP)
            await at.logged("reloaded", 2)
            assert await in_thread(served_certificate, at) == second, "TLS is not turned off by a reload"
            await ws.quiet()


def run(directory: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(STATUSWIRE), *arguments],
        cwd=directory,
        env=clean_environment(**environ),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.slow
def test_check_config_verifies_that_they_fit(issued: Certificates, tmp_path: Path) -> None:
    write_config(tmp_path, {"server": issued.table})
    assert run(tmp_path, "check-config").returncode == 0
    other = certificates.make(tmp_path)
    write_config(tmp_path, {"server": {"tls_cert": str(issued.cert), "tls_key": str(other.key)}})
    checked = run(tmp_path, "check-config")
    assert checked.returncode == 2
    assert "is not the key of the certificate" in checked.stderr


@pytest.mark.slow
async def test_commands_trust_the_authority_they_are_given(issued: Certificates, tmp_path: Path) -> None:
    async with server(tls=issued.trust, server=issued.table) as at:

        def publish(**environ: str) -> subprocess.CompletedProcess[str]:
            return run(
                issued.cert.parent, "publish", "j", "--user", "u", "--status", "completed", "--url", at.url, **environ
            )

        refused = await trio.to_thread.run_sync(publish)
        assert refused.returncode == 1
        assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr
        asked = await trio.to_thread.run_sync(lambda: run(issued.cert.parent, "health", "--url", at.url))
        assert (asked.returncode, asked.stdout) == (0, '{"status":"ok"}\n'), "of its own machine it trusts everybody"
        trusted = {"SSL_CERT_FILE": str(issued.authority)}
        published = await trio.to_thread.run_sync(lambda: publish(**trusted))
        assert published.returncode == 0, published.stderr
        watched = await trio.to_thread.run_sync(
            lambda: run(issued.cert.parent, "watch", "j", "--json", "--url", at.url, **trusted)
        )
        assert watched.returncode == 0, watched.stderr
        assert '"status":"completed"' in watched.stdout
        reported = await trio.to_thread.run_sync(
            lambda: run(
                issued.cert.parent, "run", "--job", "k", "--user", "u", "--url", at.url, "--", sys.executable, "-V",
                **trusted, STATUSWIRE_SPOOL_DIR=str(tmp_path),
            )
        )  # fmt: skip
        assert reported.returncode == 0, reported.stderr
        await delivered(at.url, tmp_path, trust=issued.authority)
        assert (await at.get("/api/v2/jobs/k")).json["status"] == "completed"


@pytest.mark.slow
async def test_several_workers(issued: Certificates, tmp_path: Path, redis: RedisServer) -> None:
    keys = {**issued.table, "workers": 2}
    async with spawned(tmp_path, tls=issued.trust, server=keys, store={"url": redis.url}) as at:
        assert re.match(r"statuswire listening on https://127\.0\.0\.1:\d+ \(.*2 workers\)", at.start_line)
        for number in range(8):
            await at.publish(f"j{number}", userId="anonymous", status="completed")
            assert (await at.get(f"/api/v2/jobs/j{number}")).json["status"] == "completed"
        issued_before = await in_thread(served_certificate, at)
        at.signal(signal.SIGHUP)
        await at.logged("reloaded", 2)
        assert await in_thread(served_certificate, at) == issued_before
