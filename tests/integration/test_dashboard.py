"""Every state of the dashboard as it looks, its other panels, and what it costs, in a real Chromium.

Each state is also a picture, in the directory that ``SCREENSHOTS`` names, else in the test's own.
"""

from __future__ import annotations

import os
import re
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio_websocket

from tests.integration.browser import NewPage
from tests.integration.pages import (
    ALL_NAMES,
    DOWN,
    END,
    ENTER,
    ESCAPE,
    HOME,
    LEFT,
    RIGHT,
    SECRET,
    STATE,
    TAB,
    TIMELINE,
    UP,
    choose,
    click,
    enter_token,
    job,
    open_live,
    open_timeline,
    publish,
    say,
    sign,
    text_of,
)
from tests.integration.pictures import WIDE, shoot, unexpected
from tests.integration.running import Running, running
from tests.pacing import Paced, for_a_while

pytestmark = [pytest.mark.slow, pytest.mark.long]

JOBS = 2000


async def furnish(server: Running) -> None:
    """Jobs of every status."""
    await publish(server, "nightly-report", kind="report", userId="alice", status="completed", message="312 pages")
    await publish(server, "video-208", kind="video", userId="carol", progress=31, stage="encode")
    await publish(server, "video-208", userId="carol", status="failed", error="no room on /srv/media")
    await publish(server, "mail-42", kind="mail", userId="bob", progress=12)
    await publish(server, "mail-42", userId="bob", status="cancelled")
    await publish(server, "index-7", kind="index", userId="bob", progress=64, stage="merge", ttl=4)
    await publish(server, "scan-1", kind="scan", userId="carol")
    await publish(server, "import-3", kind="import", userId="alice", status="queued")
    pages = {"kind": "export", "userId": "alice", "stage": "pages"}
    for done in (12, 60, 96, 120):
        steps = {"done": done, "total": 300}
        operation = f"Processing page {done}/300"
        more = {"progress": done / 3, "currentOperation": operation, "estimatedTimeRemaining": 300 - done}
        await publish(server, "export-1", **pages, **more, steps=steps)


async def test_empty_loading_and_three_jobs(new_page: NewPage, server: Running, pictures: Path) -> None:
    page = await new_page()
    await page.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="window.WebSocket = class { readyState = 0; send() {} close() {} };",
    )
    await page.open(server.url + "/")
    await page.wait(f"{text_of('empty')} === 'Loading jobs' && {STATE} === 'connecting'")
    await shoot(page, pictures / "loading")

    page = await new_page()
    await open_live(page, server)
    await page.wait(f"{text_of('empty')}.startsWith('No jobs yet')")
    await shoot(page, pictures / "empty")
    for number in (1, 2, 3):
        await publish(server, f"job-{number}", kind="export", progress=30 * number, message=f"step {number}")
    await page.wait(f"{ALL_NAMES}.length === 3")
    assert await page.run("document.getElementById('empty').hidden")
    await shoot(page, pictures / "three-jobs")


async def test_every_status_and_then_offline(new_page: NewPage, tmp_path: Path, pictures: Path) -> None:
    page = await new_page()
    async with running(tmp_path, "--store", "memory:") as server:
        await furnish(server)
        await open_live(page, server)
        colours = (
            "new Set([...document.querySelectorAll('.job .badge')].map((one) => getComputedStyle(one).color)).size"
        )
        await page.wait(f"{job('index-7', '.badge')} === 'stalled' && {colours} >= 5")
        await shoot(page, pictures / "every-status", schemes=("light",))
        await page.wait(f"{job('index-7', '.badge')} === 'failed' && {job('index-7', '.what')} === 'lost'")
        await shoot(page, pictures / "ended", schemes=("dark",))
        await open_timeline(page, "export-1")
        await shoot(page, pictures / "timeline")
        await page.press(*ESCAPE)
    await page.wait(f"{STATE} === 'offline'")
    await page.wait(
        f"{text_of('state-more')}.includes('not live since') && {text_of('state-more')}.includes('WebSocket')"
    )
    assert "grayscale" in await page.run(f"getComputedStyle({job('export-1')}).filter")
    await shoot(page, pictures / "offline")


async def test_texts_of_every_kind(new_page: NewPage, server: Running, pictures: Path) -> None:
    """The longest that are taken, without spaces, from right to left, of letters that no font here has."""
    await publish(server, "x" * 128, userId="u" * 128, kind="k" * 128, progress=7.25, message="m" * 2048)
    hebrew, arabic = (
        "\u05d3\u05d5\u05d7 \u05d9\u05d5\u05de\u05d9",
        "\u062a\u0642\u0631\u064a\u0631 \u064a\u0648\u0645\u064a 12/300",
    )
    await publish(server, "right-to-left", kind=hebrew, stage=hebrew, currentOperation=arabic, progress=50)
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
    await publish(server, "emoji", kind=family, message=f"{family} \U0001f680 " * 40, progress=99.99)
    words = "nothing was to be found where it should have been, " * 30
    await publish(server, "many-words", status="failed", progress=3, error=words, result={"rows": list(range(400))})
    await publish(server, "zero", status="queued", message="e\u0301\u0323" * 50)
    page = await new_page()
    await page.look(width=WIDE[0], height=WIDE[1])
    await open_live(page, server)
    await page.wait(f"{ALL_NAMES}.length === 5")
    await shoot(page, pictures / "texts")
    # A click in the very turn of a change of size, when nothing has been drawn yet.
    await page.run(
        "window.clicks = 0; new ResizeObserver(() => "
        f"{{ clicks += 1; {job('many-words')}.click(); }}).observe(document.getElementById('jobs'))"
    )
    await page.wait("clicks === 1")
    await page.press(*ESCAPE)
    await page.look(width=800, height=600)
    await page.wait("clicks > 1")
    await page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    chosen = "document.getElementById(document.getElementById('jobs').getAttribute('aria-activedescendant'))"
    assert await page.run(f"{chosen}?.querySelector('.name').textContent") == "many-words"
    await page.call("Page.reload")
    await page.wait(f"{STATE} === 'live' && {ALL_NAMES}.length === 5")
    await page.look(width=WIDE[0], height=WIDE[1])
    for name, picture in (("x" * 128, "longest"), ("many-words", "many-words"), ("right-to-left", "right-to-left")):
        await open_timeline(page, name)
        await shoot(page, pictures / f"texts-timeline-{picture}", schemes=("light",))
        await page.press(*ESCAPE)
    await click(page, "document.getElementById('tab-playground')")
    await click(page, "document.getElementById('wire-all')")
    await page.wait("[...document.querySelectorAll('.wire ol')].every((lane) => lane.textContent.length > 1000)")
    await shoot(page, pictures / "texts-playground", schemes=("dark",))


async def test_token_needed_bad_token_and_a_plain_user(new_page: NewPage, tmp_path: Path, pictures: Path) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        admin = await sign(tmp_path, "--sub", "root", "--admin")
        await publish(server, "hers", admin, userId="alice", kind="export", progress=40)
        await publish(server, "his", admin, userId="bob", kind="export", progress=40)
        page = await new_page()
        await page.open(server.url + "/")
        await page.wait(f"{STATE} === 'token' && document.activeElement.id === 'token'")
        await shoot(page, pictures / "token-needed")
        await enter_token(page, "not.a.token")
        await page.wait(f"{text_of('token-why')}.startsWith('The last one was refused')")
        await shoot(page, pictures / "token-refused")
        await enter_token(page, await sign(tmp_path, "--sub", "alice"))
        await page.wait(job("hers"))
        await shoot(page, pictures / "plain-user", schemes=("light",))
        for tab in ("server", "playground"):
            await click(page, f"document.getElementById('tab-{tab}')")
            await shoot(page, pictures / f"plain-user-{tab}", schemes=("light",))


async def test_the_server_and_who_is_connected(new_page: NewPage, tmp_path: Path, pictures: Path) -> None:
    page = await new_page()
    stats = "document.getElementById('stats').innerText"
    asked = "performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/stats')).length"
    async with AsyncExitStack() as clients, running(tmp_path, "--store", "memory:") as server:
        for _ in range(54):
            await clients.enter_async_context(
                trio_websocket.open_websocket_url(server.url.replace("http", "ws") + "/ws/jobs")
            )
        await open_live(page, server)
        await furnish(server)
        assert await page.run(asked) == 0  # nobody looks
        await click(page, "document.getElementById('tab-server')")
        await page.wait(f"!document.getElementById('stats').hidden && {stats}.includes('websocket\\n55')")
        shown = await page.run(stats)
        assert re.search(r"99 % within\n[\d.,]+ ms", shown), shown
        assert "memory" in shown
        assert "available" in shown
        # Rates need a second look.
        await page.wait(f"{stats}.match(/\\d updates\\/s/g)?.length === 2")
        rows = "document.querySelectorAll('#connections-rows tr').length"
        assert await page.run(rows) == 50
        assert await page.run(text_of("connections-total")) == "55 in all"
        first = await page.run(text_of("connections-rows"))
        await click(page, "document.getElementById('connections-next')")
        await page.wait(f"{rows} === 5 && document.getElementById('connections-next').disabled")
        await shoot(page, pictures / "server")
        await click(page, "document.getElementById('connections-first')")
        await page.wait(f"{rows} === 50 && {text_of('connections-rows')}.slice(0, 20) === {first[:20]!r}")
        await clients.aclose()

        os.kill(server.process.pid, signal.SIGSTOP)
        os.kill(server.process.pid, signal.SIGCONT)
    await page.wait(f"{text_of('stats-why')}.startsWith('Not as of now: the server cannot be reached. Shown is')")
    assert unexpected(page) == []


async def test_the_playground_publishes_and_shows_the_wire(new_page: NewPage, tmp_path: Path, pictures: Path) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        token = await sign(tmp_path, "--sub", "root", "--admin")
        page = await new_page()
        await page.open(server.url + "/")
        await enter_token(page, token)
        await page.wait(f"{STATE} === 'live'")
        await click(page, "document.getElementById('tab-playground')")
        await click(page, "document.getElementById('wire-all')")
        lanes = "[...document.querySelectorAll('.wire ol')].map((lane) => lane.textContent)"
        await page.wait(f"{lanes}.every((lane, at) => lane.includes(['subscribed', 'snapshot', 'GET', 'GET'][at]))")

        async def fill(**fields: str) -> None:
            for name, value in fields.items():
                await page.run(f"document.getElementById('publish').elements.{name}.value = {value!r}")
            await page.run("document.getElementById('publish').elements.jobId.focus()")
            await page.press(*ENTER)

        answer = text_of("publish-answer")
        await fill(jobId="by-hand", progress="12.5", more='{"stage":"typed"}')
        await page.wait(f"{answer}.startsWith('accepted: {{') && {answer}.includes('\"version\":1')")
        record = await say(server, "GET", "jobs/by-hand", token=token)
        assert (record["userId"], record["progress"], record["stage"]) == ("root", 12.5, "typed")
        await page.wait(f"{lanes}.every((lane) => lane.includes('by-hand') && lane.includes('typed'))")
        assert token not in await page.run("document.body.textContent")
        await shoot(page, pictures / "playground")

        await fill(more="[1]")
        await page.wait(f"{answer} === 'More fields: this is not a JSON object'")
        await fill(more="{")
        await page.wait(f"{answer}.startsWith('More fields: ')")
        await fill(more='{"progress":101}')
        await page.wait(f"{answer}.startsWith('422: ')")
        await fill(more="", jobId="played")
        await click(page, "document.getElementById('publish-play')")
        await page.wait(f"{lanes}.every((lane) => lane.includes('step 2 of 20'))")
        await click(page, "document.getElementById('publish-play')")

        # What was stopped says no more, and others' jobs do not come.
        await click(page, "document.getElementById('wire-all')")
        await click(page, "document.getElementById('wire-clear')")
        await page.run("document.getElementById('wire-jobs').value = 'wanted'")
        await click(page, "document.getElementById('wire-all')")
        await page.wait(f"{lanes}.every((lane, at) => lane.includes(['subscribed', 'connected', 'GET', 'GET'][at]))")
        await publish(server, "unwanted", token)
        await publish(server, "wanted", token, status="completed")
        await page.wait(f"{lanes}.every((lane) => lane.includes('completed'))")
        assert "unwanted" not in "".join(await page.run(lanes))
        await page.wait(f"{lanes}.slice(2).every((lane) => lane.includes('ended: all of these jobs have'))")
        assert len(await page.run(lanes)) == 4
        assert unexpected(page) == []


async def test_it_is_used_with_the_keyboard_alone(new_page: NewPage, server: Running) -> None:
    updates = [{"jobId": f"job-{n:03}", "userId": "u", "status": "queued"} for n in range(300)]
    await say(server, "POST", "updates", updates)
    page = await new_page()
    await page.look(width=WIDE[0], height=WIDE[1])
    await open_live(page, server)
    await page.wait(f"{text_of('counts')} === '300 jobs'")
    await choose(page, "sort", "name")
    order = []
    for _ in range(11):
        await page.press(*TAB)
        order.append(await page.run("document.activeElement.id || document.activeElement.dataset.status"))
        # Whatever has the focus shows it.
        outline = await page.run(
            "(() => { const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement); "
            "return [outlineStyle, parseFloat(outlineWidth)]; })()"
        )
        assert outline[0] != "none", order
        assert outline[1] >= 2, order
    statuses = ("processing", "queued", "stalled", "completed", "failed", "cancelled")
    assert order == ["transport", "tab-jobs", "text", "sort", *statuses, "jobs"]

    await page.run("document.getElementById('jobs').focus()")
    chosen = "document.getElementById(document.getElementById('jobs').getAttribute('aria-activedescendant'))"
    name = f"{chosen}?.querySelector('.name').textContent"
    for key, expected in (
        *((DOWN, "job-001"), (DOWN, "job-002"), (UP, "job-001"), (END, "job-299"), (DOWN, "job-299")),
        *((UP, "job-298"), (HOME, "job-000"), (UP, "job-000")),
    ):
        await page.press(*key)
        await page.wait(f"{name} === '{expected}' && {chosen}.getAttribute('aria-selected') === 'true'")
        # In sight, always.
        assert await page.run(
            f"(() => {{ const box = document.getElementById('jobs').getBoundingClientRect(); "
            f"const row = {chosen}.getBoundingClientRect(); "
            "return row.top >= box.top - 2 && row.bottom <= box.bottom + 2; })()"
        )
    await page.press("PageDown", 34)
    await page.wait(f"Number({chosen}.getAttribute('aria-posinset')) > 5")
    assert await page.run(f"{chosen}.getAttribute('aria-setsize')") == "300"
    await page.press(*ENTER)
    await page.wait(f"!{TIMELINE}.hidden && document.activeElement.id === 'timeline-name'")
    await page.press(*ESCAPE)
    await page.wait(f"{TIMELINE}.hidden && document.activeElement.id === 'jobs'")

    await page.run("document.getElementById('tab-jobs').focus()")
    for key, tab in ((RIGHT, "server"), (RIGHT, "playground"), (RIGHT, "jobs"), (LEFT, "playground")):
        await page.press(*key)
        await page.wait(f"document.activeElement.id === 'tab-{tab}' && !document.getElementById('panel-{tab}').hidden")
        shown = await page.run("[...document.querySelectorAll('[role=tabpanel]')].filter((one) => !one.hidden).length")
        assert shown == 1
    assert page.problems == []


async def test_everything_has_a_name(new_page: NewPage, server: Running) -> None:
    """What can be operated says to a screen reader what it is."""
    await furnish(server)
    page = await new_page()
    await open_live(page, server)
    await open_timeline(page, "export-1")
    await page.call("Accessibility.enable")
    roles = {
        "button",
        "textbox",
        "searchbox",
        "combobox",
        "tab",
        "option",
        "listbox",
        "spinbutton",
        "tabpanel",
        "region",
    }
    seen = set()
    for tab in ("jobs", "server", "playground"):
        await click(page, f"document.getElementById('tab-{tab}')")
        await page.wait(f"!document.getElementById('panel-{tab}').hidden")
        if tab == "server":
            await page.wait("!document.getElementById('connections').hidden")
        for node in (await page.call("Accessibility.getFullAXTree"))["nodes"]:
            role = node.get("role", {}).get("value")
            if node["ignored"] or role not in roles:
                continue
            seen.add(role)
            assert node["name"]["value"].strip(), node
    assert seen == roles
    await click(page, "document.getElementById('tab-jobs')")
    assert "export-1" in await page.run(f"{job('export-1')}.textContent")


async def test_motion_only_for_those_who_want_it(new_page: NewPage, server: Running) -> None:
    await publish(server, "one", progress=5)
    page = await new_page()
    await open_live(page, server)
    await page.wait(f"{job('one')} && !{job('one')}.classList.contains('still')")
    duration = f"getComputedStyle({job('one')}.querySelector('.fill')).transitionDuration"
    assert await page.run(duration) == "0.2s"
    reduced = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    await page.call("Emulation.setEmulatedMedia", features=reduced)
    assert await page.run(duration) == "0s"


async def test_what_the_policy_forbids_would_be_noticed(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await open_live(page, server)
    assert page.problems == []
    await page.run("document.body.setAttribute('style', 'color: red')")
    await page.run(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'top.x = 1' }))"
    )
    await page.run("fetch('http://127.0.0.1:9/').catch(() => 0)")
    await page.wait("true")
    assert await page.run("window.x") is None
    for directive in ("style-src", "script-src", "connect-src"):
        assert any(directive in problem for problem in unexpected(page)), directive


async def test_it_works_below_a_path(new_page: NewPage, tmp_path: Path) -> None:
    async with running(tmp_path, "--store", "memory:", environ={"STATUSWIRE_SERVER_BASE_PATH": "/live"}) as server:
        address = server.url if server.url.endswith("/live") else server.url + "/live"
        page = await new_page()
        await page.call("Page.navigate", url=address)
        await page.wait(f"location.pathname === '/live/' && {STATE} === 'live'")
        await click(page, "document.getElementById('tab-playground')")
        await click(page, "document.getElementById('wire-all')")
        await click(page, "document.querySelector('#publish [type=submit]')")
        await page.wait(
            "[...document.querySelectorAll('.wire ol')].every((one) => one.textContent.includes('playground-1'))"
        )
        await click(page, "document.getElementById('tab-jobs')")
        await open_timeline(page, "playground-1")
        assert page.problems == []


async def test_two_thousand_jobs_leave_the_browser_idle(new_page: NewPage, server: Running, pictures: Path) -> None:
    """2,000 jobs and 2,000 updates a second: most of the main thread is free, and a frame is one layout at most."""
    names = [f"job-{number:04}" for number in range(JOBS)]
    first = [
        {
            "jobId": name,
            "userId": f"user-{at % 20}",
            "kind": f"kind-{at % 5}",
            "status": "processing",
            "progress": at / 40,
        }
        for at, name in enumerate(names)
    ]
    await say(server, "POST", "updates", first)
    page = await new_page()
    await page.look(width=WIDE[0], height=WIDE[1])
    await open_live(page, server)
    await page.wait(f"{text_of('counts')} === '2,000 jobs'")
    assert await page.run("document.querySelectorAll('*').length") < 800
    await page.run("window.seen = 0; (function frame() { seen += 1; requestAnimationFrame(frame); })()")
    await page.call("Performance.enable")

    async def measured() -> dict[str, float]:
        values = (await page.call("Performance.getMetrics"))["metrics"]
        return {value["name"]: value["value"] for value in values} | {"frames": await page.run("seen")}

    sent, stopping = 0, False

    async def publish_all() -> None:
        nonlocal sent
        async for _ in Paced(20):
            if stopping:  # a request that is broken off leaves warnings behind
                return
            batch: list[dict[str, Any]] = []
            for _ in range(100):
                batch.append({"jobId": names[sent % JOBS], "progress": sent / JOBS, "message": f"step {sent}"})
                sent += 1
            assert (await client.post("/api/v2/updates", json=batch)).is_success

    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client, trio.open_nursery() as nursery:
        nursery.start_soon(publish_all)
        await page.wait(f"{ALL_NAMES}.length > 5 && document.querySelector('.what').textContent.startsWith('step')")
        before, sent_before = await measured(), sent
        await for_a_while(4)
        after, sent_after = await measured(), sent
        await shoot(page, pictures / "two-thousand-jobs", schemes=("light",))
        stopping = True
    spent = {name: after[name] - before[name] for name in after}
    rate = (sent_after - sent_before) / spent["Timestamp"]
    # Time of its thread, not of the clock: others use this machine too.
    share = spent["ThreadTime"] / spent["Timestamp"]
    clock = spent["TaskDuration"] / spent["Timestamp"]
    print(f"{rate:.0f} updates/s: main thread {share:.0%} busy, {clock:.0%} by the clock")
    assert rate > 500
    assert share * max(1, 2000 / rate) < 0.4
    assert spent["LayoutCount"] <= spent["frames"]
    assert unexpected(page) == []


async def test_the_picture_in_the_readme(new_page: NewPage, server: Running, pictures: Path) -> None:
    """Made with ``SCREENSHOTS=docs/img pytest tests/integration/test_dashboard.py -k readme``."""
    await furnish(server)
    page = await new_page()
    await page.look(width=1120, height=680)
    await open_live(page, server)
    await page.wait(f"{ALL_NAMES}.length === 7 || {ALL_NAMES}.length === 8")
    await open_timeline(page, "export-1")
    await page.wait(f"{TIMELINE}.querySelector('polyline').getAttribute('points').split(' ').length === 4")
    picture = await page.screenshot()
    assert len(picture) < 150_000
    (pictures / "dashboard.png").write_bytes(picture)
    assert page.problems == []
