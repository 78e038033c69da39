from __future__ import annotations

import ssl
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import trustme

from server.cli import main
from server.commands.client import MAX_ASKED_DELAY, is_hopeless, jittered, open_client, reason_of, retry_after


def test_full_jitter_is_bounded_and_spread() -> None:
    for attempt, bound in [(0, 0.5), (1, 1.0), (3, 4.0), (6, 20.0), (10_000, 20.0)]:
        delays = [jittered(attempt, base=0.5, cap=20.0) for _ in range(200)]
        assert 0 <= min(delays) < bound / 4
        assert bound * 3 / 4 < max(delays) <= bound


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("17", 17.0), ("99999", MAX_ASKED_DELAY), ("9" * 50, None), ("-1", None), ("soon", None), ("²", None)],
)
def test_retry_after_in_seconds(text: str, seconds: float | None) -> None:
    assert retry_after(httpx.Response(503, headers=[(b"retry-after", text.encode())])) == seconds


def test_retry_after_as_a_date() -> None:
    def asked(delta: float) -> float | None:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=delta), usegmt=True)
        return retry_after(httpx.Response(503, headers={"Retry-After": date}))

    soon = asked(60)
    assert soon is not None
    assert 50 < soon <= 60
    assert asked(-60) == 0.0
    assert asked(86_400) == MAX_ASKED_DELAY
    assert retry_after(httpx.Response(503)) is None


def test_proxies_of_the_environment_are_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with open_client("http://127.0.0.1:3000", None, read_timeout=1) as client:
        assert client.trust_env is False
    with open_client("http://status.example", None, read_timeout=1) as client:
        assert client.trust_env is True


def test_reasons_are_never_empty() -> None:
    assert reason_of(httpx.ReadError("")) == "ReadError"
    assert reason_of(httpx.ReadError("reset")) == "reset"
    assert not is_hopeless(httpx.ReadError("reset"))


@pytest.mark.parametrize(("command", "status"), [(["publish", "j"], 1), (["watch", "j"], 2)])
def test_an_untrusted_certificate_is_not_tried_again(
    command: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    attempts = []

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> tuple[ssl.SSLSocket, tuple[str, int]]:
            connection, address = super().get_request()
            attempts.append(address)
            connection.settimeout(5)
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    server = Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the refused handshake
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        assert main([*command, "--url", f"https://127.0.0.1:{server.server_address[1]}"]) == status
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert len(attempts) == 1
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
