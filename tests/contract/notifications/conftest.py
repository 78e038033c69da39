"""Who sends notifications and who may read them goes by tokens: the servers of this folder have them."""

from __future__ import annotations

import pytest

from tests.support import InProcess


@pytest.fixture
def at(guarded: InProcess) -> InProcess:
    return guarded
