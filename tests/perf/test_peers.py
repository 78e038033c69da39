"""The bench of peers: what feeds them arrives, and the documents say what was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from perf.load import LoadClient
from perf.measure import PATIENCE, Target
from perf.peers import measures, plot, table
from perf.peers.catalog import PEERS, SERVERS, descendants, started
from perf.peers.measures import SINGLE, SPREAD
from perf.peers.rounds import pairs
from perf.peers.servers.common import Kept, Lines

FED = next(peer for peer in PEERS if peer.feed == "messages")
LOOPS = [peer for peer in PEERS if peer.name.startswith("bare loop")]


def cell(theirs: list[float], ours: list[float], others: float = 1.0) -> dict[str, Any]:
    return {"ours": ours, "theirs": theirs, "load": [10.0], "their_load": [20.0], "others": [others]}


@pytest.fixture
def result() -> dict[str, Any]:
    machine = {
        "time": "2026-01-01T00:00:00Z",
        "cpu": "A",
        "cores": 2,
        "kernel": "6",
        "python": "3",
        "load_average": [0.1],
    }
    quick = {"transport": "ws", "peer": "quick", "what": "", "version": "1.2", "failed": {}}
    broken = {
        "transport": "ws",
        "peer": "broken",
        "what": "",
        "version": "",
        "cells": {},
        "failed": {"cpu1": "5 %\ncame"},
    }
    cells = {"cpu1": cell([6.0, 9.0], [3.0, 3.0]), "spread_p99": cell([8.0], [16.0], others=50.0)}
    return {"machine": machine, "seconds": 1.0, "parts": [{**quick, "cells": cells}, broken]}


@pytest.mark.parametrize(
    ("peer", "transport"),
    [pytest.param(peer, way, id=f"{peer.runs}-{way}") for peer in (FED, *LOOPS) for way in peer.transports],
)
def test_this_server_and_the_bare_loops_pass_on_what_they_are_fed(peer: Any, transport: str) -> None:
    with started(peer) as running, measures.side(running.target, transport, running) as side:
        side.open(6, 3)
        published = side.publish(10.0, requests=12, batch=2, jobs=3)
        assert published["accepted"] == 24
        report = side.delivered(48)  # two of the six readers watch each of the three channels
        assert report["latency"]["count"] == 48
        assert report["bytes"] / 48 > 100
        side.open(5)
        flying = side.publish(10.0, requests=40, lockstep=8)
        assert (flying["accepted"], side.client.report()["deliveries"]) == (40, 200)


def test_all_processes_of_a_peer_count() -> None:
    found: tuple[int, ...] = ()
    with subprocess.Popen(["sh", "-c", "sh -c 'sleep 60 & wait' & echo there; wait"], stdout=subprocess.PIPE) as shell:
        try:
            assert shell.stdout is not None
            assert shell.stdout.readline() == b"there\n"
            deadline = time.monotonic() + 30
            while len(found := tuple(descendants(shell.pid))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(found) == 2, "the shell, and what that has started"
            alone, whole = Target("alone", shell.pid, 0), Target("whole", shell.pid, 0, found)
            assert whole.resident_bytes() > alone.resident_bytes()
            assert whole.cpu_seconds() > alone.cpu_seconds()
        finally:
            for pid in (*found, shell.pid):
                os.kill(pid, signal.SIGKILL)


def test_who_does_not_deliver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "LATE_S", 0.1)
    with started(LOOPS[0]) as running, LoadClient() as client:
        side = measures.Side(running.target, client, "ws", running)
        side.open(2)
        side.publish(5.0, requests=3)
        with pytest.raises(measures.Failed, match="60 %"):
            side.delivered(10)


def test_a_long_poll_is_given_what_is_new() -> None:
    channel = Kept()
    assert channel.since(0) == b'{"updates":[],"last_seen":"0"}'
    channel.waiting.append("somebody")
    assert channel.add(b"1") == ["somebody"]
    assert channel.add(b"2") == []
    assert channel.since(1) == b'{"updates":[2],"last_seen":"2"}'
    for number in range(100):
        channel.add(b"%d" % number)
    assert channel.since(0).count(b",") == 64, "64 of them are kept"


def test_lines_are_put_together_again() -> None:
    lines = Lines()
    assert lines.feed(b"a\tx y\nb") == [("a", b"x y")]
    assert lines.feed(b"c\tz\n") == [("bc", b"z")]


def test_the_least_disturbed_pairs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATIENCE, "left", 0.0)  # or it waits until nobody else does anything
    rounds = iter([{"cpu1": 1.0, "load": 5.0, "others": 3.0}, {"cpu1": 4.0, "load": 6.0, "others": 2.0}])
    found = pairs(SINGLE, 1, lambda: next(rounds), lambda: next(rounds))["cpu1"]
    assert (found.ours, found.theirs, found.others) == ([1.0], [4.0], [3.0])
    assert (found.ratio(), found.disturbed()) == (4.0, False)


def test_a_table_has_ratios_marks_and_failures(result: dict[str, Any]) -> None:
    text = table.markdown(result, "x.json")
    assert "| statuswire | - | - | 3.00 | - | 16.0* |" in text
    assert "| quick 1.2 | - | - | 7.50 (2.50x) | - | 8.0* (0.50x) |" in text
    assert "| broken | - | - | fails |" in text
    assert "WebSocket, broken, CPU/delivery 1 in flight, µs: 5 % came" in text
    assert "quick 1.2" in table.text(result)


def test_bars_begin_with_the_least_and_end_with_who_failed(result: dict[str, Any]) -> None:
    assert plot.bars(result, "ws", SINGLE[0]) == [("statuswire", 3.0), ("quick", 7.5), ("broken", None)]
    assert plot.bars(result, "ws", SPREAD[0])[0] == ("quick", 8.0)


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    table.fill(page, "x", "new \\1")
    table.fill(page, "x", "new \\1")
    assert page.read_text() == "a\n<!-- x: begin -->\nnew \\1\n<!-- x: end -->\nb\n"
    with pytest.raises(OSError, match="<!-- y: begin -->"):
        table.fill(page, "y", "")


def test_the_documents_have_their_markers_and_every_peer_its_file() -> None:
    root = SERVERS.parents[2]
    for name in ("README.md", "docs/performance.md"):
        assert "<!-- peers: begin -->" in (root / name).read_text()
    for peer in PEERS:
        if peer is not FED:
            assert (SERVERS / (f"{peer.source}.py" if peer.runs == "python" else peer.source)).exists()
    pinned = (SERVERS.parent / "requirements.txt").read_text().lower()
    node = json.loads((SERVERS.parent / "package-lock.json").read_text())["packages"]
    for peer in PEERS:
        if peer.package and peer.runs == "python":
            assert f"{peer.package}==" in pinned
        elif peer.package:
            assert f"node_modules/{peer.package}" in node
