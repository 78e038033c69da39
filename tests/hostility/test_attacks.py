"""Every attack in the table, against one server: what it leaves behind would show in those that follow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostility.attacks import ATTACKS, KIB, MIB
from tests.hostility.siege import Ground, ground, siege
from tests.support import AUTH, WORKER

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Less patience than the defaults have, so that its end is seen; bounds that are soon reached.
TABLES: dict[str, dict[str, object]] = {
    "auth": {**AUTH},
    "server": {"max_connections": 12_000, "heartbeat": 0.5},
    # Ordinary readers are not taken for dead on a machine that lets them wait for a while.
    "health": {"check_interval": 0.2, "stale_after": 5},
    "history": {"max_updates": 50_000, "max_bytes": 24 * MIB, "max_jobs": 2000},
    "limits": {
        "head_timeout": 1,
        "body_timeout": 1,
        "upload_timeout": 2,
        "send_timeout": 1,
        "auth_timeout": 1,
        "poll_timeout": 2,
        "backlog": 256 * KIB,
        "unfinished": 32 * MIB,
    },
}


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with ground(tmp_path_factory.mktemp("besieged"), **TABLES) as found:
        yield found


@pytest.mark.parametrize("name", ATTACKS)
async def test_readers_memory_and_recovery(name: str, besieged: Ground) -> None:
    seed = [{"jobId": f"seed{number}", "userId": "mallory", "message": "m" * 1000} for number in range(200)]
    assert (await besieged.at.post("/api/v2/updates", seed, WORKER)).json["rejected"] == []
    await siege(besieged, name, ATTACKS[name].memory)
