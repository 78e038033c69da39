"""The examples in the package and in its document, run as they stand against a real server."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import trio

import statuswire
from statuswire import aio, jobs, notices
from tests.producer.workers import record, run
from tests.support import ROOT, server

EXAMPLES = (jobs, aio, notices)


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STATUSWIRE_SPOOL_DIR", str(tmp_path))
    monkeypatch.delenv("STATUSWIRE_TOKEN", raising=False)


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("module", EXAMPLES, ids=lambda module: module.__name__)
async def test_examples_in_the_package(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server() as at:
        client = statuswire.configure(at.url)
        monkeypatch.setattr("statuswire.client._default", client)

        def run() -> int:
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            names: dict[str, object] = {}
            count = 0
            for example in doctest.DocTestFinder(recurse=True).find(module, extraglobs=names):
                if example.examples:
                    count += len(example.examples)
                    result = runner.run(example)
                    assert result.failed == 0, example.name
            assert client.flush(20)
            client.close()
            return count

        assert await trio.to_thread.run_sync(run) >= 2
        if module is jobs:
            for name in ("export-1", "video-1", "print-1", "import-1"):
                assert (await record(at, name))["status"] == "completed", name


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("document", ["README.md", "docs/workers.md"])
async def test_examples_in_the_documents(document: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    async with server() as at:
        await run("\n".join([*blocks, "assert flush()"]), at.url, tmp_path)
        ended = (await at.get("/api/v2/jobs?status=completed")).json["jobs"]
        assert {one["jobId"] for one in ended} >= {"export-2"}
        assert len(ended) == (1 if document == "README.md" else 7)
