"""What several modules of this folder start from."""

from __future__ import annotations

import pytest

from tests import certificates
from tests.certificates import Certificates


@pytest.fixture(scope="session")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate of an authority that nobody else trusts. Tests that change the files make their own."""
    return certificates.make(tmp_path_factory.mktemp("certificates"))
