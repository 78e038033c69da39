"""A real Chromium without a window, driven over its own debugging protocol (CDP)."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import trio
import trio_websocket

from tests.support import PATIENCE_S, wait_for

# A screenshot of a long page is some megabytes of base64.
MAX_MESSAGE = 64 * 1024 * 1024
LISTENING = re.compile(rb"DevTools listening on (ws://\S+)\n")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Root in a container has no sandbox; the rest keeps it from talking to anyone but us.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class PageError(AssertionError):
    """JavaScript threw."""


class Page:
    """One tab, or with ``session`` None the browser itself.

    Attributes:
        problems: uncaught exceptions and what the browser complained of, violations of the content security policy too.
        sent: every request as (method, url).
        context: what it shares storage with.
        browser: what it is a tab of.
    """

    def __init__(self, socket: trio_websocket.WebSocketConnection, session: str | None) -> None:
        self.problems: list[str] = []
        self.sent: list[tuple[str, str]] = []
        self.context: dict[str, Any] = {}
        self.browser: Page | None = None
        self._socket = socket
        self._session = {} if session is None else {"sessionId": session}
        self._answers: dict[int, tuple[trio.Event, dict[str, Any]]] = {}
        self._last_id = 0

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """One CDP command."""
        self._last_id += 1
        arrived, answer = self._answers[self._last_id] = trio.Event(), {}
        message = {"id": self._last_id, "method": method, "params": params}
        await self._socket.send_message(json.dumps(message | self._session))
        with trio.fail_after(PATIENCE_S):
            await arrived.wait()
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def hear(self, message: dict[str, Any]) -> None:
        """Take one message of the browser."""
        if "id" in message:
            arrived, answer = self._answers.pop(message["id"])
            answer.update(message)
            arrived.set()
            return
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.sent.append((params["request"]["method"], params["request"]["url"]))
            case "Network.webSocketCreated":
                self.sent.append(("WEBSOCKET", params["url"]))

    async def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise PageError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    async def wait(self, condition: str) -> Any:
        """Wait until an expression is truthy, looked at once per frame; returns its value."""
        try:
            return await self.run(
                f"""new Promise((resolve, reject) => {{
                    const deadline = performance.now() + {PATIENCE_S * 1000 - 2000};
                    const look = () => {{
                        const value = ({condition});
                        if (value) resolve(value);
                        else if (performance.now() > deadline) reject(new Error(document.body.innerText));
                        else if (document.hidden) setTimeout(look, 20); // what is not seen has no frames
                        else requestAnimationFrame(look);
                    }};
                    look();
                }})"""
            )
        except PageError as error:
            raise PageError(f"never came true: {condition}\n{error}") from None

    async def open(self, url: str) -> None:
        """Go to an address and wait until the document is there."""
        await self.call("Page.navigate", url=url)
        await self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release one key; ``code`` is its Windows virtual key code."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def write(self, text: str) -> None:
        """Type text into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def look(self, *, width: int, height: int, scheme: str = "light") -> None:
        """Set the size of the window, in CSS pixels, and the preferred colour scheme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        result = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(result["data"])


class NewPage(Protocol):
    """Opens a tab with storage of its own, or ``beside`` another one, whose storage it shares."""

    def __call__(self, beside: Page | None = None) -> Awaitable[Page]: ...


def find_chromium() -> str:
    """The browser's program; `make system` installs one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, f"none of {', '.join(NAMES)} is installed: run `make system`"
    return found


@contextmanager
def started_chromium(directory: Path) -> Iterator[str]:
    """Run Chromium; yields the address of its debugger. Its profile, and what it complains of, are in ``directory``."""
    complaints = directory / "chromium.log"
    with complaints.open("wb") as stderr:
        process = subprocess.Popen(
            [
                find_chromium(),
                *FLAGS,
                "--remote-debugging-port=0",
                f"--user-data-dir={directory / 'profile'}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        wait_for(lambda: process.poll() is not None or LISTENING.search(complaints.read_bytes()))
        match = LISTENING.search(complaints.read_bytes())
        assert match, complaints.read_text(errors="replace")
        yield match[1].decode()
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def using_browser(address: str) -> AsyncIterator[NewPage]:
    """Use a browser that runs: what opens tabs in it."""
    async with (
        trio_websocket.open_websocket_url(address, max_message_size=MAX_MESSAGE, message_queue_size=1000) as socket,
        trio.open_nursery() as nursery,
    ):
        pages: dict[str | None, Page] = {}
        browser = pages[None] = Page(socket, None)
        contexts: list[dict[str, Any]] = []
        nursery.start_soon(_dispatch, socket, pages)

        async def new_page(beside: Page | None = None) -> Page:
            if beside is None:
                context = await browser.call("Target.createBrowserContext")
                contexts.append(context)
            else:
                context = beside.context
            target = await browser.call("Target.createTarget", url="about:blank", **context)
            attached = await browser.call("Target.attachToTarget", flatten=True, targetId=target["targetId"])
            page = pages[attached["sessionId"]] = Page(socket, attached["sessionId"])
            page.context = context
            page.browser = browser
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            return page

        try:
            yield new_page
        finally:
            with trio.CancelScope(shield=True):
                for context in contexts:
                    await browser.call("Target.disposeBrowserContext", **context)
        nursery.cancel_scope.cancel()


async def _dispatch(socket: trio_websocket.WebSocketConnection, pages: dict[str | None, Page]) -> None:
    try:
        while True:
            message = json.loads(await socket.get_message())
            page = pages.get(message.get("sessionId"))
            if page is not None:
                page.hear(message)
    except trio_websocket.ConnectionClosed:
        pass
