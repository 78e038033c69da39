"""The Autobahn test suite against ``/ws/echo``: nothing failed, nothing non-strict, nothing unimplemented."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.conformance.autobahn import EVERYTHING, GROUPS, IN_A_HURRY, Verdict, counted, fuzz, fuzz_parts, version
from tests.conformance.results import Results
from tests.support import spawned

pytestmark = pytest.mark.slow

# What a server does here is nowhere laid down; the suite only writes it down.
INFORMATIONAL = {"7.1.6", "7.13.1", "7.13.2"}


def is_right(verdict: Verdict) -> bool:
    """OK in what was said and in how it ended, or nothing that could be wrong."""
    return verdict.case in INFORMATIONAL or (verdict.behavior, verdict.closing) == ("OK", "OK")


async def test_autobahn(tmp_path: Path, results: Results) -> None:
    began = time.monotonic()
    async with spawned(tmp_path, debug={"echo": True}, store={"url": "memory:"}) as at:
        url = f"{at.ws_url}/ws/echo"
        verdicts = await fuzz_parts(url, EVERYTHING if results.long else IN_A_HURRY, tmp_path)
        assert len(verdicts) == (517 if results.long else 267)
        # The suite gives a server one second to end a connection, which a machine may spend on others: asked once more.
        if doubtful := [verdict.case for verdict in verdicts if not is_right(verdict)][:10]:
            again = {verdict.case: verdict for verdict in await fuzz(url, doubtful, tmp_path)}
            verdicts = [again.get(verdict.case, verdict) for verdict in verdicts]
    wrong = [verdict for verdict in verdicts if not is_right(verdict)]
    assert not wrong
    informational = {verdict.case for verdict in verdicts if verdict.behavior == "INFORMATIONAL"}
    assert informational == INFORMATIONAL
    for group, count in counted(verdicts).items():
        results.add(f"Autobahn {version()}", f"{group} {GROUPS[group]}", dict(count))
    results.took(f"Autobahn {version()}", time.monotonic() - began)
