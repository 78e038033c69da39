"""`make example-vanilla` and the others: one command, one address, and a page whose jobs are live in a real Chromium.

Each state is also a picture, in the directory that ``SCREENSHOTS`` names, else in the test's own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
import trio
import trustme

from tests.integration.browser import NewPage, Page, PageError
from tests.integration.pictures import shoot, unexpected
from tests.integration.running import ROOT, clean_environment, free_port, running
from tests.nginx import running_nginx
from tests.support import until
from tests.web.pages import TRANSPORTS
from tools.examples.nginx_example import configure

pytestmark = [pytest.mark.slow, pytest.mark.long]

START_S = 120
OPEN = re.compile(r"^Open (http\S+) in a browser", re.MULTILINE)
FIRST = "document.querySelector('#jobs li')"
BAR = f"{FIRST}?.querySelector('job-progress, progress')"
SAYS = f"{FIRST}?.querySelector('.says')?.textContent"
STATE = "document.getElementById('state')?.textContent"


def of_session(session: int) -> list[str]:
    """The command lines of all processes in a session, those that have ended and wait for their parent left out."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its_session = directory.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(directory.joinpath("cmdline").read_text().replace("\0", " "))
    return found


@cache
def install(place: str) -> None:
    """What an example is made of, as its make target does it; at once if that is there."""
    subprocess.run(["make", "--silent", f".venv/{place}/.done"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@asynccontextmanager
async def example(directory: Path, kind: str, *flags: str) -> AsyncIterator[str]:
    """Run an example as its make target does; its address. It must end well at Ctrl-C, with nothing left running."""
    log = directory / "log"
    command = [sys.executable, "-m", "tools.examples.web", kind, "--port", "0", *flags]
    with log.open("wb") as out:
        process = await trio.to_thread.run_sync(
            lambda: subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=clean_environment()
            )
        )
    try:
        await until(lambda: process.poll() is not None or OPEN.search(log.read_text()), within=START_S)
        found = OPEN.search(log.read_text())
        assert found, log.read_text()
        yield found[1]
        # As a terminal does it: every process is told.
        os.killpg(process.pid, signal.SIGINT)
        with trio.CancelScope(shield=True):
            assert await trio.to_thread.run_sync(lambda: process.wait(60)) == 0, log.read_text()
        assert of_session(process.pid) == []
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.terminate()
                with trio.move_on_after(30):
                    await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await trio.to_thread.run_sync(process.wait)


async def see(page: Page, condition: str) -> None:
    """Wait until an expression is truthy, also if the page goes to another address meanwhile."""
    with trio.fail_after(30):
        while True:
            try:
                await page.wait(condition)
                return
            except PageError as error:
                if "navigated" not in str(error) and "context" not in str(error):
                    raise


async def start(page: Page, pages: int) -> None:
    """Have a job done, by what is on the page."""
    await page.run(f"document.querySelector('[name=pages]').value = {pages}")
    await page.run("document.querySelector('#start button').click()")


async def runs_to_its_end(page: Page, picture: Path) -> None:
    """The bar moves, comes to 100, and the page says how it ended."""
    await page.call("Page.bringToFront")  # what is not seen is not drawn
    value = f"Number({BAR}?.getAttribute('aria-valuenow') ?? {BAR}?.value ?? 0)"
    await see(page, f"{value} > 0 && {value} < 100")
    await see(page, f"{SAYS}?.startsWith('Page ')")
    await shoot(page, picture.with_name(f"{picture.name}-at-work"), schemes=("light",))
    await see(page, f"{value} === 100 && {SAYS} === 'completed: Ready to download'")
    await shoot(page, picture.with_name(f"{picture.name}-done"))


@pytest.mark.parametrize(("kind", "flags"), [("vanilla", ()), ("react", ("--built",))], ids=["vanilla", "react"])
async def test_a_page(new_page: NewPage, tmp_path: Path, pictures: Path, kind: str, flags: tuple[str, ...]) -> None:
    if kind == "react":
        install("react")
    async with example(tmp_path, kind, *flags) as url:
        page = await new_page()
        await page.open(f"{url}/")
        await see(page, f"{STATE} === 'Live'")
        await start(page, 12)
        await runs_to_its_end(page, pictures / kind)
        # Another one is stopped by its button; a page that is loaded again knows of both.
        await start(page, 500)
        await see(page, f"{SAYS}?.startsWith('Page ')")
        await page.run(f"{FIRST}.querySelector('button').click()")
        await see(page, f"{SAYS}?.startsWith('cancelled')")
        await page.open(f"{url}/?again")
        await see(page, f"{STATE} === 'Live'")
        await see(page, all_are("cancelled", "completed"))
        await shoot(page, pictures / f"{kind}-cancelled", schemes=("dark",))
        assert unexpected(page) == []


async def test_react_while_it_is_worked_on(new_page: NewPage, tmp_path: Path) -> None:
    """Vite's server for development, and its proxy."""
    install("react")
    async with example(tmp_path, "react") as url:
        page = await new_page()
        await page.open(f"{url}/")
        await see(page, f"{STATE} === 'Live'")
        await start(page, 1)
        await see(page, all_are("completed"))
        assert unexpected(page) == []


async def log_in(page: Page, url: str, user: str) -> None:
    """As a person does; then the page is live."""
    await page.open(f"{url}/")
    await see(page, "document.getElementById('login')")
    for name, value in (("user", user), ("password", f"{user}-secret")):
        await page.run(f"document.querySelector('[name={name}], [name={name}name]').value = '{value}'")
    await page.run("document.querySelector('#login button').click()")
    await see(page, f"{STATE} === 'Live'")


async def cookies_of(page: Page) -> dict[str, str]:
    """The browser's, also those that scripts cannot read."""
    return {one["name"]: one["value"] for one in (await page.call("Network.getCookies"))["cookies"]}


async def address(page: Page) -> str:
    """Of statuswire, as the page knows it."""
    found: str = await page.run(
        "JSON.parse(document.querySelector('[type=importmap]').textContent).imports['statuswire/']"
    )
    return urljoin(await page.run("location.href"), found).rstrip("/")


async def seen_by(page: Page, job_id: str) -> str:
    """A job's status, or why it is not told, for whoever has logged in there."""
    asked = f"fetch({json.dumps(f'{await address(page)}/api/v2/jobs/{job_id}')}, {{ credentials: 'include' }})"
    said = await page.run(f"{asked}.then((answer) => answer.json())")
    status: str = said["error"]["code"] if isinstance(said.get("error"), dict) else said["status"]
    return status


def all_are(*statuses: str) -> str:
    """What the list says of all its jobs, the newest first, as a JavaScript condition."""
    said = "[...document.querySelectorAll('#jobs li')].map((row) => row.dataset.status).join()"
    return f"{said} === '{','.join(statuses)}'"


async def each_transport(page: Page, url: str, start_one: Callable[[], Awaitable[object]]) -> None:
    """A client for each, by an address below the page's origin: it sees a job from its beginning to its end, once."""
    for transport in TRANSPORTS:
        await page.run(
            f"""(async () => {{
                const {{ connect }} = await import("{url}client.js");
                window.client = connect({{ transports: ["{transport}"] }});
                window.seen = [];
                client.watch({{ all: true }}, (job) => seen.push(job));
            }})()"""
        )
        await see(page, f"client.live && client.transport === '{transport}'")
        await page.run("void (window.known = new Set(seen.map((job) => job.jobId)))")
        await start_one()
        await see(page, "seen.some((job) => !known.has(job.jobId) && job.status === 'completed')")
        versions = await page.run("seen.filter((job) => !known.has(job.jobId)).map((job) => job.version)")
        assert versions == sorted(set(versions)), transport
        await page.run("client.disconnect()")


@pytest.mark.parametrize("kind", ["fastapi", "django", "nginx"])
async def test_sessions(new_page: NewPage, tmp_path: Path, pictures: Path, kind: str) -> None:
    """Two users with their own jobs each; logging out ends what the session has opened."""
    install("examples")
    async with example(tmp_path, kind) as url:
        ann, ben = await new_page(), await new_page()
        await ann.open(f"{url}/")
        if kind != "nginx":  # whose pages are those of FastAPI
            await shoot(ann, pictures / f"{kind}-login")
        await ann.run("document.querySelector('[type=password]').value = 'a guess'")
        await ann.run("document.querySelector('[name=user], [name=username]').value = 'ann'")
        await ann.run("document.querySelector('#login button').click()")
        await see(ann, "document.querySelector('[role=alert]')?.textContent.includes('password')")
        await shoot(ann, pictures / f"{kind}-refused", schemes=("light",))
        await log_in(ann, url, "ann")
        await log_in(ben, url, "ben")
        tab = await new_page(ann)
        await tab.open(f"{url}/")
        await see(tab, f"{STATE} === 'Live'")
        await start(ann, 12)
        await runs_to_its_end(ann, pictures / kind)
        await see(tab, all_are("completed"))
        # Ben's page has a job of his own by now, and none of hers; nor can he have it by its id.
        await start(ben, 1)
        await see(ben, all_are("completed"))
        if kind == "nginx":
            asked = "fetch('/exports', { method: 'POST', body: new URLSearchParams({ pages: 2 }) })"
            await each_transport(ben, "/status/", lambda: ben.run(f"{asked}.then((answer) => answer.ok)"))
            # The hook is for statuswire, which asks it directly.
            assert await ben.run("fetch('/statuswire/who').then((answer) => answer.status)") == 404
        hers = await ann.run(f"{FIRST}.querySelector('strong').textContent")
        assert await seen_by(ben, hers) == "job_not_found"
        assert await seen_by(ann, hers) == "completed"

        old = await cookies_of(ann)
        statuswire = await address(ann)
        await ann.run("document.querySelector('#logout button').click()")
        await see(ann, "document.getElementById('login')")
        # The other tab's connection was ended, so it has asked the application again.
        await see(tab, "document.getElementById('login')")
        assert await ben.run(STATE) == "Live"
        # Whoever has kept the cookie gets nothing for it, although the application's answer was remembered.
        async with httpx.AsyncClient(cookies=old) as client:
            assert (await client.get(f"{statuswire}/api/v2/jobs")).status_code == 401
        assert unexpected(ann) == []
        assert unexpected(ben) == []


@pytest.mark.parametrize(
    ("site", "socket", "tls"),
    [("base-path", "tcp", False), ("own-host", "unix", True)],
    ids=["base-path", "own-host-unix-tls"],
)
async def test_each_variant_of_the_nginx_sample(
    new_page: NewPage, tmp_path: Path, site: str, socket: str, tls: bool
) -> None:
    file, listen, path = f"site-{site}.conf", f"127.0.0.1:{free_port()}", "/status/" if site == "base-path" else "/"
    certificate = tmp_path / "certificate.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    unix = str(tmp_path / "socket")
    environ = {"STATUSWIRE_SERVER_BASE_PATH": path.rstrip("/"), "STATUSWIRE_SERVER_UNIX_SOCKET": unix}
    async with running(tmp_path, "--store", "memory:", environ=environ) as server:
        statuswire = f"127.0.0.1:{server.port}" if socket == "tcp" else f"unix:{unix}"
        # What is not below the path (a browser asks for /favicon.ico) is refused there: no loop through nginx.
        application = f"127.0.0.1:{server.port}" if site == "base-path" else ""
        configuration = configure(tmp_path, file, listen, statuswire, application, certificate if tls else None)
        async with running_nginx(configuration):
            page = await new_page()
            # The certificate is nobody's.
            await page.call("Security.setIgnoreCertificateErrors", ignore=True)
            url = f"{'https' if tls else 'http'}://{listen}{path}"
            # A page without anything on it.
            await page.open(f"{url}client.d.ts?access_token=a.secret.one")

            jobs = count()

            async def start_one() -> None:
                where = f"{server.url}/api/v2/jobs/job-{next(jobs)}/updates"
                async with httpx.AsyncClient() as client:
                    for update in (
                        {"status": "processing", "userId": "ann"},
                        {"progress": 50},
                        {"status": "completed"},
                    ):
                        assert (await client.post(where, json=update)).is_success

            await each_transport(page, url, start_one)
            protocol = await page.run("performance.getEntriesByType('navigation')[0].nextHopProtocol")
            assert protocol == ("h2" if tls else "http/1.1")
            assert (await page.run(f"fetch('{url}metrics').then((answer) => answer.status)")) == 200
    log = (tmp_path / "statuswire.log").read_text()
    assert f"GET {path}client.d.ts" in log
    assert f"GET {path}ws/jobs" in log
    assert "secret" not in log
