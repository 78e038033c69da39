"""The dashboard as tests see and use it: expressions for the browser, and requests to the server behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.integration.browser import Page
from tests.integration.running import STATUSWIRE, Running, clean_environment

SECRET = "a-secret-of-thirty-two-bytes-or-more"
ENTER, ESCAPE, TAB = ("Enter", 13, "\r"), ("Escape", 27), ("Tab", 9)
DOWN, UP, END, HOME = ("ArrowDown", 40), ("ArrowUp", 38), ("End", 35), ("Home", 36)
LEFT, RIGHT, SPACE = ("ArrowLeft", 37), ("ArrowRight", 39), (" ", 32, " ")
STATE = "document.getElementById('state')?.dataset.state"
NOTICE = "document.getElementById('notice')"
# Rows are elements used again and again: those in sight, from top to bottom.
ROWS = """[...document.querySelectorAll('.job:not([hidden])')]
    .sort((one, other) => one.getAttribute('aria-posinset') - other.getAttribute('aria-posinset'))"""
ALL_NAMES = f"{ROWS}.map((row) => row.querySelector('.name').textContent)"
TIMELINE = "document.getElementById('timeline')"


def text_of(element_id: str) -> str:
    """The text of an element, as a JavaScript expression."""
    return f"document.getElementById('{element_id}').textContent"


def job(job_id: str, part: str = "") -> str:
    """The row of a job, or the text of one part of it, as a JavaScript expression; undefined while there is no row."""
    row = f"{ROWS}.find((row) => row.querySelector('.name').textContent === {json.dumps(job_id)})"
    return f"{row}?.querySelector('{part}').textContent" if part else row


async def say(server: Running, method: str, path: str, body: object = None, token: str = "") -> Any:
    """One request to the API."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        response = await client.request(method, f"/api/v2/{path}", json=body, headers=headers)
    assert response.is_success, response.text
    return response.json() if response.content else None


async def publish(server: Running, job_id: str, token: str = "", **fields: object) -> Any:
    """Create or update a job."""
    update = {"userId": "anonymous", "status": "processing"} | fields
    return await say(server, "POST", f"jobs/{job_id}/updates", update, token)


async def choose(page: Page, select: str, value: str) -> None:
    """Choose from a list, as a person does."""
    await page.run(
        f"(() => {{ const list = document.getElementById('{select}'); list.value = '{value}'; "
        "list.dispatchEvent(new Event('change')); })()"
    )


async def click(page: Page, expression: str) -> None:
    """Click an element."""
    await page.run(f"({expression}).click()")


async def open_live(page: Page, server: Running, transport: str = "websocket") -> None:
    """Open the dashboard, and wait until it says that it is live by this transport."""
    await page.open(server.url + "/")
    await page.wait(f"{STATE} === 'live'")
    if transport != "websocket":
        await choose(page, "transport", transport)
        name = {"sse": "SSE", "longpoll": "long-poll", "poll": "polling"}[transport]
        await page.wait(f"{STATE} === 'live' && {text_of('state-text')} === 'Live by {name}'")


async def sign(directory: Path, *arguments: str) -> str:
    """A token made by the command line."""
    done = await trio.run_process(
        [str(STATUSWIRE), "token", "--jwt-key", SECRET, *arguments],
        capture_stdout=True,
        cwd=directory,
        env=clean_environment(),
    )
    return done.stdout.decode().strip()


async def enter_token(page: Page, token: str) -> None:
    """Type a token into the form that has asked for it, with the keyboard alone."""
    await page.wait("document.activeElement.id === 'token'")
    await page.write(token)
    await page.press(*ENTER)


async def open_timeline(page: Page, job_id: str) -> None:
    """Click a job and wait for its timeline."""
    await page.wait(job(job_id))
    await click(page, job(job_id))
    await page.wait(f"{text_of('timeline-name')} === {json.dumps(job_id)} && {TIMELINE}.querySelector('.updates li')")


def action(words: str) -> str:
    """A button of the timeline."""
    return f"[...document.querySelectorAll('#timeline button')].find((one) => one.textContent === '{words}')"
