"""Conformance: what fits into ordinary tests, or all of it if ``CONFORMANCE`` names a file for what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.results import Results


@pytest.fixture(scope="session")
def results() -> Iterator[Results]:
    file = os.environ.get("CONFORMANCE")
    found = Results(long=file is not None)
    yield found
    if file is not None:
        Path(file).write_text(json.dumps(found.saved()))
