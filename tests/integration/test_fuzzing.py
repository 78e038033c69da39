"""A fuzzing client reads ``/openapi.json`` and tries everything that it says, and what it does not say.

No answer may be a 500, and each must be as described: its status, its content type, and its JSON to the last member.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import ADMIN, AUTH, ROOT, bearer, spawned

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Endless answers, which the tests of event streams read.
STREAMS = "(?i)stream$"
# More is asked than a schema can say: a handshake, a cursor there is, a target and its ids, the task of the path. So
# what fits the schema may be refused, but what does not must be, and each answer must be a described one.
CONFIG = "positive_data_acceptance.enabled = false\n"


def strict(schema: Any) -> Any:
    """The same, but nothing may be there that is not described."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tightened = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        tightened["additionalProperties"] = False
    return tightened


async def fuzz(directory: Path, url: str, document: Any, headers: dict[str, str], phases: str) -> str:
    """Run the client, which must find nothing; its report."""
    (directory / "openapi.json").write_text(json.dumps(strict(document)))
    tokens = f"[checks]\nignored_auth.enabled = {json.dumps(bool(headers))}\n"
    (directory / "schemathesis.toml").write_text(tokens + CONFIG)
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", "openapi.json", "--url", url,
        "--exclude-operation-id-regex", STREAMS, "--phases", phases,
        "--max-examples", "10", "--generation-deterministic", "--request-timeout", "30", "--continue-on-failure",
        "--suppress-health-check", "all", "--no-color",
    ]  # fmt: skip
    for name, value in headers.items():
        command += ["--header", f"{name}: {value}"]
    # Nothing of ours runs in it: measuring its coverage would only make it slower.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment |= {"SCHEMATHESIS_HOOKS": "tests.integration.fuzzing_hooks", "PYTHONPATH": str(ROOT)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=500)

    done = await trio.to_thread.run_sync(run)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5000:]
    return done.stdout


async def test_without_authentication(tmp_path: Path) -> None:
    async with spawned(tmp_path, history={"max_jobs": 500}) as at:
        document = (await at.get("/openapi.json")).json
        await fuzz(tmp_path, at.url, document, {}, "coverage,fuzzing")
        assert (await at.get("/ready")).status == 200
        assert "status=500" not in at.log()


@pytest.mark.parametrize(
    ("caller", "phases"), [(ADMIN, "fuzzing"), (bearer("alice"), "coverage")], ids=["admin", "user"]
)
async def test_with_tokens(caller: dict[str, str], phases: str, tmp_path: Path) -> None:
    async with spawned(tmp_path, auth=AUTH, store={"url": "memory:"}) as at:
        document = (await at.get("/openapi.json")).json
        await fuzz(tmp_path, at.url, document, caller, phases)
        assert (await at.get("/ready")).status == 200
        assert "status=500" not in at.log()
