"""React hooks and <job-progress> on a page of another origin, and what many bars cost."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.integration.browser import NewPage, Page
from tests.integration.running import running
from tests.pacing import Paced
from tests.support import Address, server, until
from tests.web.pages import publish
from tests.web.tools import ROOT, WEB, web_tools

pytestmark = pytest.mark.slow

BARS = 200
UPDATES_PER_SECOND = 50
TURNS = 200  # four seconds


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def application(directory: Path) -> Iterator[str]:
    """Serve a directory: the application's own pages, as far as a browser can tell."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(directory))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}"
        finally:
            served.shutdown()
            thread.join()


def bundle(directory: Path, entry: str, *flags: str) -> Path:
    """A file of these tests with its packages from npm in it."""
    tools = web_tools()
    made = directory / Path(entry).with_suffix(".mjs").name
    subprocess.run(
        [
            *(tools / ".bin" / "esbuild", f"tests/web/{entry}", f"--outfile={made}", "--format=esm", *flags),
            *("--bundle", "--log-level=error", '--define:process.env.NODE_ENV="development"'),
        ],
        check=True,
        cwd=ROOT,
        env={"NODE_PATH": str(tools), "PATH": os.environ["PATH"]},
    )
    return made


def write_page(directory: Path, at: Address, script: str) -> None:
    """A page with a place for React and a script, with React bundled beside it and the client from a server."""
    bundle(directory, "react-all.mjs")
    imports = {
        "react": "./react-all.mjs",
        "react-dom/client": "./react-all.mjs",
        "statuswire-client": f"{at.url}/client.js",
        "statuswire-react": f"{at.url}/react.js",
    }
    (directory / "index.html").write_text(
        f"""<!doctype html><link rel="icon" href="data:,"><div id="root"></div>
        <script type="importmap">{json.dumps({"imports": imports})}</script>
        <script type="module">{script}</script>"""
    )


async def shows(page: Page, name: str, text: str) -> None:
    """Wait for the text of an element."""
    await page.wait(f"document.getElementById('{name}')?.textContent === {json.dumps(text)}")


async def test_hooks_in_strict_mode(new_page: NewPage, tmp_path: Path) -> None:
    with application(tmp_path) as url:
        async with server(cors={"origins": [url]}) as at:
            write_page(tmp_path, at, (ROOT / "tests" / "web" / "react-page.mjs").read_text())
            page = await new_page()
            await page.open(f"{url}/index.html")
            await shows(page, "job", "- - true open")
            await publish(at, status="processing", progress=10)
            await shows(page, "job", "1 10 true open")
            await shows(page, "jobs", "job-1 true")
            await shows(page, "task", "running true open -")
            await publish(at, "job-2", progress=1)
            await shows(page, "jobs", "job-1,job-2 true")
            for data in (1, 2):
                body = {"target": "channel", "targetId": "news", "event": "e", "data": data}
                assert (await at.post("/api/sse/message", body)).status == 200
            await shows(page, "news", "1,2")
            assert len(at.node.streams) == 1, "all hooks share a connection"

            await page.run("showJob('job-2')")
            await shows(page, "job", "1 1 true open")
            await publish(at, "job-2", status="failed", error="no room")
            await shows(page, "task", "failed true open no room")
            told = await page.run("texts.told.join()")
            assert told == "running,pending,failed", told

            await page.run("task.disconnect()")
            await shows(page, "task", "failed false closed no room")
            await page.run("task.reconnect()")
            await shows(page, "task", "failed true open no room")
            await page.run("unmount()")
            (session,) = at.node.streams
            await until(lambda: not session.wants)
            assert page.problems == []


async def test_a_hook_with_settings_has_its_own_connection(new_page: NewPage, tmp_path: Path) -> None:
    with application(tmp_path) as url:
        async with server(cors={"origins": [url]}) as at:
            write_page(
                tmp_path,
                at,
                f"""
                import {{ StrictMode, createElement }} from "react";
                import {{ createRoot }} from "react-dom/client";
                import {{ useTaskProgress }} from "statuswire-react";
                const said = (window.said = []);
                const options = {{ url: "{at.url}", transports: ["sse"],
                    onConnect: () => said.push("connect"), onDisconnect: () => said.push("disconnect") }};
                function Task() {{
                    const {{ progress, connection }} = useTaskProgress("job-1", options);
                    return createElement("p", {{ id: "task" }}, `${{progress?.progress}} ${{connection}}`);
                }}
                const root = createRoot(document.getElementById("root"));
                root.render(createElement(StrictMode, null, createElement(Task)));
                window.unmount = () => root.unmount();
                """,
            )
            await publish(at, progress=30)
            page = await new_page()
            await page.open(f"{url}/index.html")
            await shows(page, "task", "30 open")
            await until(lambda: [stream.transport for stream in at.node.streams] == ["sse"])
            assert await page.run("said") == ["connect"]
            await page.run("unmount()")
            await page.wait("said.length === 2")
            await until(lambda: not [stream for stream in at.node.streams if stream.transport == "sse"])
            assert page.problems == []


async def test_hooks_are_given_something_else(new_page: NewPage, tmp_path: Path) -> None:
    with application(tmp_path) as url:
        async with server(cors={"origins": [url]}) as at:
            write_page(tmp_path, at, (ROOT / "tests" / "web" / "react-changes.mjs").read_text())

            async def tell(data: str) -> None:
                body = {"target": "channel", "targetId": "news", "event": "e", "data": data}
                assert (await at.post("/api/sse/message", body)).status == 200

            def transports() -> list[str]:
                return sorted(stream.transport for stream in at.node.streams)

            await publish(at, "hers", userId="ann", progress=10)
            await publish(at, "his", userId="ben", progress=20)
            page = await new_page()
            await page.open(f"{url}/index.html")
            await page.wait("window.ready")
            await page.run("render({ user: 'ann', reader: 'ann', id: 'hers' })")
            await shows(page, "jobs", "hers")
            await shows(page, "job", "10 true")
            await tell("one")
            await shows(page, "news", "one")

            # Another user's jobs, another reader's news, another job.
            await page.run("render({ user: 'ben', reader: 'ben', id: 'his' })")
            await shows(page, "jobs", "his")
            await shows(page, "job", "20 true")
            await shows(page, "news", "")
            await tell("two")
            await shows(page, "news", "two")
            # One that there is not is known not to be there; nothing to watch at all is fine.
            await page.run("render({ user: 'ben', reader: 'ben', id: 'nobody-knows' })")
            await shows(page, "job", " true")
            await page.run("render({ user: 'ben', reader: 'ben', id: 'his' })")
            await shows(page, "job", "20 true")
            await page.run("render({ user: 'ben', reader: 'ben', id: null })")
            await shows(page, "job", " true")

            # Gone, and back: meanwhile nothing is watched.
            await page.run("render({})")
            await until(lambda: not any(stream.wants for stream in at.node.streams))
            await publish(at, "his", userId="ben", progress=30)
            await page.run("render({ user: 'ben', reader: 'ben', id: 'his' })")
            await shows(page, "job", "30 true")
            await shows(page, "jobs", "his")
            assert set(transports()) <= {"sse", "longpoll"}, "the client that was provided"

            # A connection of its own is its own: it can be ended, and made again, alone; other settings are another.
            await page.run("render({ user: 'ben', reader: 'ben', id: 'his', own: ['websocket'] })")
            await shows(page, "own", "10 true open")
            await until(lambda: transports().count("websocket") == 1)
            await page.run("task.disconnect()")
            await shows(page, "own", "10 false closed")
            await until(lambda: "websocket" not in transports())
            assert await page.run("client.live")
            await page.run("task.reconnect()")
            await shows(page, "own", "10 true open")
            await page.run("render({ user: 'ben', reader: 'ben', id: 'his', own: ['poll'] })")
            await shows(page, "own", "10 true polling")
            await until(lambda: "websocket" not in transports())
            assert page.problems == []


def test_hooks_on_the_server(tmp_path: Path) -> None:
    made = bundle(
        tmp_path,
        "react-server.mjs",
        f"--alias:statuswire-react={WEB / 'react.js'}",
        "--platform=node",
        "--format=cjs",
    )
    made = made.rename(made.with_suffix(".cjs"))
    done = subprocess.run(["node", made], capture_output=True, text=True, check=True, timeout=30)
    assert '<p id="job">- - false connecting</p><p id="jobs"> false</p>' in done.stdout


async def test_a_bar_says_what_it_knows(new_page: NewPage, tmp_path: Path) -> None:
    page = await new_page()
    bar = "document.querySelector('job-progress')"
    with application(tmp_path) as url:
        async with running(tmp_path, environ={"STATUSWIRE_CORS_ORIGINS": url}) as first:
            at = Address(first.port)
            (tmp_path / "index.html").write_text(
                f"""<!doctype html><link rel="icon" href="data:,"><job-progress job="job-1"></job-progress>
                <script type="module" src="{at.url}/job-progress.js"></script>"""
            )
            await page.open(f"{url}/index.html")
            await page.wait(f"{bar}.dataset.live === 'true'")
            assert await page.run(f"[{bar}.role, {bar}.ariaValueNow, {bar}.dataset.status]") == [
                "progressbar",
                None,
                "unknown",
            ]
            await publish(at, status="processing")
            await page.wait(f"{bar}.dataset.status === 'processing'")
            assert await page.run(f"{bar}.ariaValueNow") is None, "nobody has said how far it is"
            await publish(at, progress=45.9)
            await page.wait(f"{bar}.ariaValueNow === '45'")
            assert await page.run(f"{bar}.ariaValueText") == "45 %, processing"
            assert await page.run(f"{bar}.shadowRoot.querySelector('[part=fill]').style.backgroundSize") == "46% auto"
            await publish(at, "job-2", status="completed")
            await page.run(f"{bar}.setAttribute('job', 'job-2')")
            await page.wait(f"{bar}.ariaValueNow === '100' && {bar}.dataset.status === 'completed'")
        await page.wait(f"{bar}.dataset.live === 'false'")
        assert await page.run(f"{bar}.ariaValueText") == "100 %, completed, not live"
        assert page.problems == [problem for problem in page.problems if "ERR_CONNECTION" in problem]


async def test_bars_look_like_what_they_say(new_page: NewPage, tmp_path: Path) -> None:
    """A picture of every state, light and dark, in the directory that ``SCREENSHOTS`` names."""
    pictures = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    names = ("unknown", "queued", "started", "half", "completed", "failed", "cancelled")
    bars = "".join(f'<p>{name} <job-progress job="{name}"></job-progress></p>' for name in names)
    page = await new_page()
    await page.look(width=360, height=360)
    with application(tmp_path) as url:
        async with running(tmp_path, environ={"STATUSWIRE_CORS_ORIGINS": url}) as started:
            at = Address(started.port)
            await publish(at, "queued", status="queued")
            await publish(at, "started", status="processing")
            for name in names[3:]:
                await publish(at, name, status="processing", progress=50)
            for name in names[4:]:
                await publish(at, name, status=name)
            (tmp_path / "index.html").write_text(
                f"""<!doctype html><link rel="icon" href="data:,"><meta name="color-scheme" content="light dark">
                <meta name="viewport" content="width=device-width">
                <style>p {{ display: grid; grid-template-columns: 6em 1fr; margin: 1em }}</style>
                {bars}<script type="module" src="{at.url}/job-progress.js"></script>"""
            )
            await page.open(f"{url}/index.html")
            await page.wait("document.querySelector('[job=cancelled]').dataset.status === 'cancelled'")
            await shoot_bars(page, pictures / "bars")
            # How long each is drawn is how far each is.
            filled = await page.run(
                "[...document.querySelectorAll('job-progress')]"
                ".map((bar) => parseFloat(bar.shadowRoot.querySelector('[part=fill]').style.backgroundSize))"
            )
            assert filled == [0, 0, 0, 50, 100, 50, 50]
            colours = await painted(page)
            assert colours[:3] == [(None, None)] * 3
            assert all(left and not right for left, right in (colours[3], *colours[5:])), colours
            assert len({left for left, _ in colours[3:]}) == 4, "each end, and none, has a colour of its own"
        await page.wait("document.querySelectorAll('[data-live=false]').length === 7")
        await shoot_bars(page, pictures / "bars-not-live")
        assert all(left and not right for left, right in (await painted(page))[5:6]), "as far as before"


async def painted(page: Page) -> list[tuple[str | None, str | None]]:
    """The colours of each bar at a quarter and at three quarters of its length, None where it is only ground."""
    image = base64.b64encode(await page.screenshot()).decode()
    found: list[list[str | None]] = await page.run(
        f"""(async () => {{
            const image = await createImageBitmap(await (await fetch("data:image/png;base64,{image}")).blob());
            const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
            canvas.drawImage(image, 0, 0);
            return [...document.querySelectorAll("job-progress")].map((bar) => {{
                const part = bar.shadowRoot.querySelector("[part=bar]");
                const {{ left, top, width, height }} = part.getBoundingClientRect();
                return [0.25, 0.75].map((share) => {{
                    const [r, g, b] = canvas.getImageData(left + width * share, top + height / 2, 1, 1).data;
                    return Math.max(r, g, b) - Math.min(r, g, b) < 10 ? null : `${{r}} ${{g}} ${{b}}`;
                }});
            }});
        }})()"""
    )
    return [(left, right) for left, right in found]


async def shoot_bars(page: Page, picture: Path) -> None:
    """Light and dark."""
    for scheme in ("light", "dark"):
        await page.look(width=360, height=360, scheme=scheme)
        await page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        picture.with_name(f"{picture.name}-{scheme}.png").write_bytes(await page.screenshot())
        assert await page.run("document.documentElement.scrollWidth") <= 360


async def test_two_hundred_bars_leave_the_page_free(new_page: NewPage, tmp_path: Path) -> None:
    """10,000 updates a second: the main thread is busy for less than 30 % of the time, and nothing is drawn late."""
    ids = [f"job-{number}" for number in range(BARS)]
    page = await new_page()
    with application(tmp_path) as url:
        async with running(tmp_path, "--store", "memory:", environ={"STATUSWIRE_CORS_ORIGINS": url}) as started:
            at = Address(started.port)
            bars = "".join(f'<job-progress job="{job_id}"></job-progress>' for job_id in ids)
            (tmp_path / "index.html").write_text(
                f"""<!doctype html><link rel="icon" href="data:,">
                <style>body {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px 16px }}</style>
                {bars}<script type="module" src="{at.url}/job-progress.js"></script>"""
            )
            await page.open(f"{url}/index.html")
            await page.wait("document.querySelectorAll('job-progress[data-live=true]').length === 200")
            # Each frame of a socket would be told to this test, at the page's cost.
            await page.call("Network.disable")
            await page.run(LATENESS)
            await page.call("Performance.enable")
            # Other work on the machine only ever makes it worse: the best of three counts.
            rounds = []
            async with httpx.AsyncClient(base_url=at.url, timeout=20) as client:
                while len(rounds) < 3 and not any(one["ThreadTime"] < 0.3 for one in rounds):
                    rounds.append(await measured(page, client, ids, first=len(rounds) * TURNS))
            last = (len(rounds) * TURNS - 1) // 10
            await page.wait(f"document.querySelectorAll('job-progress[aria-valuenow=\"{last}\"]').length === {BARS}")
            late = await page.run("late")
            print(rounds, late)
            assert min(one["ThreadTime"] for one in rounds) < 0.3, rounds
            assert late["looked"] > 0
            assert late["wrong"] == 0, late


async def measured(page: Page, client: httpx.AsyncClient, ids: list[str], first: int) -> dict[str, float]:
    """Publish to all jobs for some seconds; what share of them the main thread was busy, by CPU time and by tasks."""
    before = await metrics(page)
    async for turn in Paced(UPDATES_PER_SECOND, TURNS):
        batch = [{"jobId": job_id, "userId": "u", "progress": (first + turn) / 10} for job_id in ids]
        (await client.post("/api/v2/updates", json=batch)).raise_for_status()
    after = await metrics(page)
    passed = after["Timestamp"] - before["Timestamp"]
    busy = {name: (after[name] - before[name]) / passed for name in ("ThreadTime", "TaskDuration", "ScriptDuration")}
    return busy | {"updates/s": TURNS * len(ids) / passed}


# Frames are counted before the bars are drawn: what came before the last one has been drawn by now.
LATENESS = """(async () => {
    const { connect } = await import(document.querySelector("script").src.replace("job-progress", "client"));
    const bars = [...document.querySelectorAll("job-progress")];
    window.late = { looked: 0, wrong: 0, frames: 0 };
    let before = new Map();
    const look = () => {
        late.frames += 1;
        for (const [bar, progress] of before) {
            late.looked += 1;
            const shown = parseFloat(bar.shadowRoot.querySelector("[part=fill]").style.backgroundSize);
            if (shown < progress - 0.11) late.wrong += 1;
        }
        before = new Map(bars.filter((bar) => bar.job).map((bar) => [bar, bar.job.progress]));
        requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
})()"""


async def metrics(page: Page) -> dict[str, float]:
    """What the browser has counted of a page."""
    found = (await page.call("Performance.getMetrics"))["metrics"]
    return {one["name"]: one["value"] for one in found}
