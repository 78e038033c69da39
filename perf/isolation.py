"""Whether time tells a job that is another user's from one that is not there: make isolation.

One connection asks for both and for a second absent one, in random order. Printed is the probability that an answer
about the foreign job takes longer than one about an absent job (0.5: time says nothing), and, as the noise of this
machine, the same for two absent ones.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jwt

SECRET = "a secret for measuring, 32 bytes or more"
TARGETS = (
    "/api/v2/jobs/{}",
    "/api/v2/jobs/{}/history",
    "/api/v2/jobs/poll?timeout=0&jobIds={}",
    "/api/v2/jobs/poll?timeout=0&last_seen=1&jobIds={}",
)
# Of equal length, like ids that somebody guesses.
FOREIGN, ABSENT, OTHER = "secret-1", "absent-1", "absent-2"


class Client:
    """One connection, one request at a time."""

    def __init__(self, port: int, **claims: object) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._token = jwt.encode(claims, SECRET, "HS256")

    def ask(self, method: str, target: str, body: object = None) -> float:
        """Seconds from the request to the end of its answer."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self._token}\r\n"
        if content:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        request = head.encode() + b"\r\n" + content
        begin = time.perf_counter()
        self._socket.sendall(request)
        received = b""
        while not _whole(received):
            piece = self._socket.recv(65536)
            if not piece:
                raise ConnectionError(received)
            received += piece
        return time.perf_counter() - begin


def _whole(received: bytes) -> bool:
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return False
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def longer(one: list[float], other: list[float]) -> float:
    """The probability that one of the first takes longer than one of the others."""
    ranked = sorted([(value, 0) for value in one] + [(value, 1) for value in other])
    ranks = sum(rank for rank, (_, which) in enumerate(ranked, 1) if which == 0)
    return (ranks - len(one) * (len(one) + 1) / 2) / (len(one) * len(other))


def main() -> None:
    """Start a server, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="memory:")
    parser.add_argument("--requests", type=int, default=4000, help="of each kind")
    parser.add_argument("--updates", type=int, default=1000, help="of the foreign job")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--store", arguments.store, "--jwt-key", SECRET]
    command += ["--log-level", "warning"]
    with tempfile.TemporaryDirectory() as directory:
        environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            match = re.search(r":(\d+)", process.stdout.readline().partition("http://")[2])
            assert match is not None
            _measure(int(match[1]), arguments.requests, arguments.updates)
        finally:
            process.terminate()
            process.wait()


def _measure(port: int, requests: int, updates: int) -> None:
    worker = Client(port, sub="worker", capabilities=["publish"])
    for number in range(updates):
        update = {"userId": "alice", "status": "processing", "stage": f"{number}", "message": "x" * 200}
        worker.ask("POST", f"/api/v2/jobs/{FOREIGN}/updates", update)
    bob = Client(port, sub="bob")
    for target in TARGETS:
        taken: dict[str, list[float]] = {FOREIGN: [], ABSENT: [], OTHER: []}
        order = [*taken] * requests
        random.shuffle(order)
        for name in order:
            taken[name].append(bob.ask("GET", target.format(name)))
        medians = "  ".join(f"{name} {statistics.median(times) * 1e6:.1f} µs" for name, times in taken.items())
        foreign, noise = longer(taken[FOREIGN], taken[ABSENT]), longer(taken[OTHER], taken[ABSENT])
        print(f"{target.format('ID'):52} longer {foreign:.3f} (noise {noise:.3f})  medians {medians}")


if __name__ == "__main__":
    main()
