"""`make example-vanilla` and the others: one command, one address, and a page whose jobs are live in a real Chromium.

Each state is also a picture, in the directory that ``SCREENSHOTS`` names, else in the test's own.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.integration.browser import Page, started_chromium, using_browser
from tests.integration.pages import NewPage
from tests.integration.pictures import directory_of_pictures, shoot, unexpected
from tests.integration.running import ROOT, clean_environment

pytestmark = pytest.mark.slow

START_S = 120
FIRST = "document.querySelector('#jobs li')"
BAR = f"{FIRST}?.querySelector('job-progress, progress')"
SAYS = f"{FIRST}?.querySelector('.says')?.textContent"
STATE = "document.getElementById('state')?.textContent"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started_chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def new_page(chromium: str) -> AsyncIterator[NewPage]:
    async with using_browser(chromium) as opened:
        yield opened


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return directory_of_pictures(tmp_path / "screenshots")


def of_session(session: int) -> list[str]:
    """The command lines of all processes in a session, those that have ended and wait for their parent left out."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its_session = directory.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(directory.joinpath("cmdline").read_text().replace("\0", " "))
    return found


@asynccontextmanager
async def example(directory: Path, kind: str, *flags: str, **environ: str) -> AsyncIterator[str]:
    """Run an example as its make target does; its address. It must end well at Ctrl-C, with nothing left running."""
    log = directory / "log"
    command = [sys.executable, str(ROOT / "tools" / "examples" / "web.py"), kind, "--port", "0", *flags]
    with log.open("wb") as out:
        process = await trio.to_thread.run_sync(
            lambda: subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env=clean_environment(**environ)
            )
        )
    try:
        with trio.fail_after(START_S):
            while not (found := re.search(r"^Open (http\S+) in a browser", log.read_text(), re.MULTILINE)):
                assert process.poll() is None, log.read_text()
                await trio.sleep(0.05)
        yield found[1]
        # As a terminal does it: every process is told.
        os.killpg(process.pid, signal.SIGINT)
        with trio.CancelScope(shield=True):
            assert await trio.to_thread.run_sync(lambda: process.wait(60)) == 0, log.read_text()
        assert of_session(process.pid) == []
        assert "Traceback" not in log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(process.wait)


async def start(page: Page, pages: int) -> None:
    """Have a job done, by what is on the page."""
    await page.run(f"document.querySelector('[name=pages]').value = {pages}")
    await page.run("document.querySelector('#start button').click()")


async def runs_to_its_end(page: Page, picture: Path) -> None:
    """The bar moves, comes to 100, and the page says how it ended."""
    value = f"Number({BAR}?.getAttribute('aria-valuenow') ?? {BAR}?.value ?? 0)"
    await page.wait(f"{value} > 0 && {value} < 100")
    await page.wait(f"{SAYS}?.startsWith('Page ')")
    await shoot(page, picture.with_name(f"{picture.name}-at-work"), schemes=("light",))
    await page.wait(f"{value} === 100 && {SAYS} === 'completed: Ready to download'")
    await shoot(page, picture.with_name(f"{picture.name}-done"))


async def test_vanilla(new_page: NewPage, tmp_path: Path, pictures: Path) -> None:
    async with example(tmp_path, "vanilla") as url:
        page = await new_page()
        await page.open(f"{url}/")
        await page.wait(f"{STATE} === 'Live'")
        await start(page, 12)
        await runs_to_its_end(page, pictures / "vanilla")
        # Another one is stopped by its button, a page that is loaded again knows of both.
        await start(page, 500)
        await page.wait(f"{SAYS}?.startsWith('Page ')")
        await page.run(f"{FIRST}.querySelector('button').click()")
        await page.wait(f"{SAYS}?.startsWith('cancelled')")
        await page.open(f"{url}/?again")
        await page.wait(f"{STATE} === 'Live'")
        said = "[...document.querySelectorAll('#jobs li')].map((row) => row.dataset.status).sort().join()"
        await page.wait(f"{said} === 'cancelled,completed'")
        await shoot(page, pictures / "vanilla-cancelled", schemes=("dark",))
        assert unexpected(page) == []
