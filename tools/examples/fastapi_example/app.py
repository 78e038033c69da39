"""A FastAPI application with sessions of its own, whose users watch their own jobs, and nobody else's.

The browser sends statuswire what it has: this application's session cookie. statuswire asks at `/statuswire/who`, with
that cookie, whose it is (`auth.hook_url`). So there is one login, no token in any page, and no second list of users.

Run: make example-fastapi. By hand, beside `statuswire serve --config statuswire.toml`, with a worker's token in
STATUSWIRE_TOKEN (see there): uvicorn app:app --port 8000
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template
from typing import Annotated
from uuid import uuid4

import httpx
from fastapi import Cookie, Depends, FastAPI, Form, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from statuswire import JobCancelled, aio

PAGES = Path(__file__).parent / "pages"
# What the page with the jobs does. The Django example has the same one.
SCRIPT = Path(__file__).parents[1] / "session_page.js"
# Where workers and we find statuswire, and where browsers do.
STATUSWIRE = os.environ.get("STATUSWIRE_URL", "http://127.0.0.1:3000")
PUBLIC_STATUSWIRE = os.environ.get("PUBLIC_STATUSWIRE_URL", STATUSWIRE)
SESSION_S = 8 * 3600

# A real application has hashes of passwords here, and both tables in a database.
USERS = {"ann": "ann-secret", "ben": "ben-secret"}
# By the cookie's value: the user, and the unix time at which it ends. They are kept here and not in a signed cookie, so
# that logging out ends a session and does not merely ask the browser to forget it.
sessions: dict[str, tuple[str, float]] = {}
working: set[asyncio.Task[None]] = set()

app = FastAPI(openapi_url=None)
log = logging.getLogger("uvicorn.error")


def session_of(session: Annotated[str, Cookie()] = "") -> tuple[str, float] | None:
    """The session that a request's cookie names: its user and its end."""
    found = sessions.get(session)
    if found is not None and found[1] <= time.time():
        return sessions.pop(session, None) and None
    return found


Session = Annotated[tuple[str, float] | None, Depends(session_of)]


@app.get("/statuswire/who")
async def who(session: Session) -> dict[str, str | float]:
    """The auth hook: whose session this is. statuswire remembers the answer for `auth.hook_cache` seconds."""
    if session is None:
        raise HTTPException(401)
    user, ends = session
    # Connections that are live end with the session.
    return {"userId": user, "expiresAt": ends}


@app.post("/exports")
async def start(session: Session, pages: Annotated[int, Form(ge=1, le=500)]) -> Response:
    """Start a job in the user's name, which is the session's and nothing that a form could say."""
    if session is None:
        raise HTTPException(401)
    task = asyncio.create_task(export(f"export-{uuid4().hex[:8]}", session[0], pages))
    # asyncio itself holds tasks weakly.
    working.add(task)
    task.add_done_callback(working.discard)
    return RedirectResponse("/", 303)


async def export(job_id: str, user: str, pages: int) -> None:
    """The work. However the block is left, by its end, an exception or a cancellation, that is how the job ends."""
    # A lease: should this process be killed, those who watch see it within seconds.
    with suppress(JobCancelled):
        async with aio.job(job_id, user=user, kind="export", ttl=10, raise_on_cancel=True) as job:
            for page in range(1, pages + 1):
                await asyncio.sleep(0.2)
                job.progress(100 * page / pages, f"Page {page} of {pages}", steps=(page, pages))
            await job.complete(message="Ready to download", result={"pages": pages})


@app.get("/")
async def index(session: Session) -> HTMLResponse:
    """The user's jobs, or the login."""
    if session is None:
        return page("login.html", problem="")
    return page("jobs.html", user=session[0], statuswire=PUBLIC_STATUSWIRE)


@app.get("/page.js")
async def script() -> FileResponse:
    """What the page with the jobs does."""
    return FileResponse(SCRIPT, media_type="text/javascript")


@app.post("/login")
async def login(user: Annotated[str, Form()], password: Annotated[str, Form()]) -> Response:
    """Begin a session."""
    if not secrets.compare_digest(USERS.get(user, "").encode() or secrets.token_bytes(), password.encode()):
        return page("login.html", problem="That is not the password.", status=403)
    name, ends = secrets.token_urlsafe(), time.time() + SESSION_S
    sessions[name] = (user, ends)
    answer = RedirectResponse("/", 303)
    # Lax: forms of other sites do not send it. Another port of the same host is the same site. With HTTPS: secure=True.
    answer.set_cookie("session", name, max_age=SESSION_S, httponly=True, samesite="lax")
    return answer


@app.post("/logout")
async def logout(found: Session, session: Annotated[str, Cookie()] = "") -> Response:
    """End a session, and what it has opened."""
    if found is not None:
        # In this order: a page that comes back at once must not find the session.
        del sessions[session]
        await disconnect(found[0])
    answer = RedirectResponse("/", 303)
    answer.delete_cookie("session")
    return answer


async def disconnect(user: str) -> None:
    """End the user's live connections, and have statuswire ask anew whose a session is.

    Pages of the user's other sessions, on another device say, load themselves again.
    """
    headers = {"Authorization": f"Bearer {os.environ['STATUSWIRE_TOKEN']}"}
    try:
        async with httpx.AsyncClient(headers=headers, timeout=5) as client:
            (await client.delete(f"{STATUSWIRE}/api/sse/users/{user}")).raise_for_status()
    except httpx.HTTPError as error:
        # Nobody is kept from logging out by it: then they end when the session would have, by `expiresAt`.
        log.warning("connections of %s stay open: %s", user, error)


def page(name: str, status: int = 200, **values: str) -> HTMLResponse:
    """A file with values filled in."""
    template = Template((PAGES / name).read_text())
    return HTMLResponse(template.substitute({key: escape(value) for key, value in values.items()}), status)
