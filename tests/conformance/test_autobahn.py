"""The Autobahn test suite against ``/ws/echo``: nothing failed, nothing non-strict, nothing unimplemented."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.conformance.autobahn import EVERYTHING, GROUPS, IN_A_HURRY, counted, fuzz, version
from tests.conformance.results import Results
from tests.support import spawned

pytestmark = pytest.mark.slow

# What a server does here is nowhere laid down; the suite only writes it down.
INFORMATIONAL = {"7.1.6", "7.13.1", "7.13.2"}


async def test_autobahn(tmp_path: Path, results: Results) -> None:
    began = time.monotonic()
    async with spawned(tmp_path, debug={"echo": True}, store={"url": "memory:"}) as at:
        verdicts = await fuzz(f"{at.ws_url}/ws/echo", EVERYTHING if results.long else IN_A_HURRY, tmp_path)
    assert len(verdicts) == (517 if results.long else 267)
    informational = {verdict.case for verdict in verdicts if verdict.behavior == "INFORMATIONAL"}
    assert informational == INFORMATIONAL
    wrong = [
        each for each in verdicts if each.case not in INFORMATIONAL and (each.behavior, each.closing) != ("OK", "OK")
    ]
    assert not wrong
    for group, count in counted(verdicts).items():
        results.add(f"Autobahn {version()}", f"{group} {GROUPS[group]}", dict(count))
    results.took(f"Autobahn {version()}", time.monotonic() - began)
