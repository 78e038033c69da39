from __future__ import annotations

import pytest

from server.commands import publish, watch


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATUSWIRE_URL", "STATUSWIRE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # Retries as usual, only sooner.
    for module in (publish, watch):
        monkeypatch.setattr(module, "BASE_DELAY", 0.001)
