"""What the documents say of the browser's side is so: their pages run as they stand, their tables are compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.browser import NewPage
from tests.support import server
from tests.web.pages import publish
from tests.web.test_components import application
from tests.web.tools import ROOT, WEB

pytestmark = pytest.mark.slow

DOCUMENT = (ROOT / "docs" / "client.md").read_text()
README = (ROOT / "README.md").read_text()
TYPES = (WEB / "client.d.ts").read_text()


def fences(text: str, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n((?:.*\n)*?)```$", text, re.MULTILINE)


def table(heading: str) -> list[list[str]]:
    """The names in the first column of the table below a heading, each row's by themselves."""
    below = DOCUMENT.partition(f"{heading}\n\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", below.partition("\n\n#")[0], re.MULTILINE)
    return [re.findall(r"`([^`]+)`", row) for row in rows]


def members(interface: str) -> list[str]:
    """What is declared of an interface."""
    body = re.search(rf"^export interface {interface}\b[^{{]*\{{\n(.*?)^\}}", TYPES, re.MULTILINE | re.DOTALL)
    assert body, interface
    return list(dict.fromkeys(re.findall(r"^  (?:readonly )?(\w+)\??[:(]", body[1], re.MULTILINE)))


async def test_the_pages_in_the_documents_run(new_page: NewPage, tmp_path: Path) -> None:
    with application(tmp_path) as url:
        async with server(cors={"origins": [url]}) as at:
            pages = [*fences(README, "html"), *fences(DOCUMENT, "html")]
            assert len(pages) == 3
            text = (
                "\n".join(pages).replace("https://status.example.com", at.url).replace("http://127.0.0.1:3000", at.url)
            )
            # What it says in the end is told on the page.
            said = "<script>window.said = []; console.log = (...words) => said.push(words.join(' '));</script>"
            styles = "".join(f"<style>{block}</style>" for block in fences(DOCUMENT, "css"))
            (tmp_path / "index.html").write_text(f'<!doctype html><link rel="icon" href="data:,">{said}{styles}{text}')
            await publish(at, "export-1", status="processing", progress=45)
            page = await new_page()
            await page.open(f"{url}/index.html")
            await page.wait("document.title === '45 %' && said[0] === 'processing 45'")
            await page.wait("document.querySelectorAll('job-progress[aria-valuenow=\"45\"]').length === 2")
            part = "document.querySelector('job-progress').shadowRoot.querySelector('[part={}]')"
            assert await page.run(f"getComputedStyle({part.format('bar')}).height") == "16px"
            assert await page.run(f"getComputedStyle({part.format('label')}).fontWeight") == "700"
            assert "rgb(102, 51, 153)" in await page.run(f"getComputedStyle({part.format('fill')}).backgroundImage")
            (callback, loop, *_) = fences(DOCUMENT, "js")
            await page.run(
                f"""import("{at.url}/client.js").then(({{ connect }}) => {{
                    const client = connect();
                    const {{ signal }} = new AbortController();
                    const drawn = (window.drawn = []);
                    const draw = ({{ progress }}) => drawn.push(progress);
                    {callback}
                    (async () => {{ {loop} drawn.push("end"); }})();
                }})"""
            )
            await page.wait("drawn.length === 1")
            await publish(at, "export-1", status="failed", error="no room")
            await page.wait("drawn.join() === '45,45,end' && said[1] === 'failed 45'")
            await page.wait("document.querySelector('job-progress').dataset.status === 'failed'")
            assert "rgb(220, 20, 60)" in await page.run(f"getComputedStyle({part.format('fill')}).backgroundImage")
            assert page.problems == []


async def test_the_script_that_is_no_module(new_page: NewPage, tmp_path: Path) -> None:
    """It sets ``statuswire``, knows where it came from, and finds what shares connections."""
    with application(tmp_path) as url:
        async with server(cors={"origins": [url]}, server={"base_path": "/status"}) as at:
            (tmp_path / "index.html").write_text(
                f"""<!doctype html><link rel="icon" href="data:,"><script src="{at.url}/status/client.iife.js"></script>
                <script>
                    window.client = statuswire.connect({{ share: true }});
                    client.watch("job-1", (job) => (window.version = job.version));
                </script>"""
            )
            page = await new_page()
            await page.open(f"{url}/index.html")
            await page.wait("client.live && client.transport === 'websocket'")
            await at.post("/status/api/v2/jobs/job-1/updates", {"userId": "anonymous", "progress": 1})
            await page.wait("window.version === 1")
            assert [sent for _, sent in page.sent if sent.endswith("/status/share.js")]
            assert await page.run("Object.keys(statuswire).sort()") == ["StatusError", "connect"]
            assert page.problems == []


def test_every_option_call_and_word_is_documented() -> None:
    options = {name.partition("(")[0] for row in table("### Options") for name in row}
    assert options == set(members("Options"))
    calls = {name.partition("(")[0].partition(".")[2] for row in table("## The client") for name in row} - {""}
    assert calls | {"state", "transport", "live", "error"} == set(members("Client"))
    assert all(f"`client.{name}`" in DOCUMENT for name in ("state", "transport", "live", "error"))
    assert {f'"{name}"' for (name,) in table("### State")} == words("State")
    (transports,) = [line for line in DOCUMENT.splitlines() if line.startswith("| `transports`")]
    assert all(word in transports for word in words("Transport"))


def words(kind: str) -> set[str]:
    """Those that a type is one of, in quotes."""
    declared = re.search(rf"^export type {kind} = (.*);", TYPES, re.MULTILINE)
    assert declared
    return set(declared[1].split(" | "))
