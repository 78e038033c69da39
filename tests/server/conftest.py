"""What several modules of this folder start from."""

from __future__ import annotations

import pytest

from server import hub
from tests import certificates
from tests.certificates import Certificates


@pytest.fixture(scope="session")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate of an authority that nobody else trusts. Tests that change the files make their own."""
    return certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's flusher lets others run after every reader."""
    monkeypatch.setattr(hub, "LOOK_EVERY", 1)
    monkeypatch.setattr(hub, "YIELD_AFTER_S", -1.0)
