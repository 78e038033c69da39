"""The files that browsers are given, and what their page asks first: who looks."""

from __future__ import annotations

import re

from server.routes.page import FILES
from tests.support import ADMIN, AUTH, ROOT, bearer, server

WEB = ROOT / "server" / "web"


async def test_each_file_has_its_type_its_tag_and_no_rights() -> None:
    types = {".js": "text/javascript", ".cjs": "text/javascript", ".css": "text/css", ".ts": "text/plain"}
    async with server(auth=AUTH) as at:
        for name in ("", *FILES):
            answer = await at.get(f"/{name}")
            file = WEB / (name or "index.html")
            assert (answer.status, answer.body) == (200, file.read_bytes()), name
            assert answer.headers["content-type"] == f"{types.get(file.suffix, 'text/html')}; charset=utf-8"
            again = await at.get(f"/{name}", {"If-None-Match": answer.headers["etag"]})
            assert (again.status, again.body) == (304, b"")
            policy = answer.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"} <= {
                *policy
            }
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"


async def test_no_other_file_is_given() -> None:
    async with server() as at:
        for target in (
            *("/index.html", "/web/index.html", "/dashboard", "/Dashboard.js", "/dashboard.js/", "/dashboard.js/x"),
            *("/../page.py", "/..%2froutes/page.py", "/%2e%2e/cli.py", "//etc/passwd", "/src/index.js", "/src"),
            *("/dashboard.js%00.css", "/dashboard.js%2f..%2f..%2fcli.py", "/./dashboard.js%20"),
        ):
            assert (await at.get(target)).status in (400, 404), target


def test_what_the_page_loads_is_there_and_nothing_is_written_in_it() -> None:
    page = (WEB / "index.html").read_text()
    loaded = set(re.findall(r'(?:src|href)="([^"]+)"', page)) - {"api/v2/jobs"}
    loaded = {name for name in loaded if not name.startswith("data:")}
    for name in FILES:
        loaded |= set(re.findall(r'from "\./([^"]+)"', (WEB / name).read_text()))
    assert loaded <= {*FILES}
    # What the policy would forbid, and what would make markup of text.
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script>", page)
    for name in FILES:
        if (WEB / name).suffix == ".js" and "client" not in name:
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", (WEB / name).read_text()
            )


async def test_one_may_ask_who_one_is() -> None:
    async with server(auth=AUTH) as at:
        assert (await at.get("/api/v2/me")).error == "unauthorized"
        plain = await at.get("/api/v2/me", bearer("alice"))
        assert plain.json == {"userId": "alice", "admin": False, "capabilities": []}
        assert plain.headers["cache-control"] == "no-store"
        worker = await at.get("/api/v2/me", bearer("worker", capabilities=["publish", "ops", "other"]))
        assert worker.json == {"userId": "worker", "admin": False, "capabilities": ["ops", "publish"]}
        assert (await at.get("/api/v2/me", ADMIN)).json["capabilities"] == ["notify", "ops", "publish"]
    async with server() as at:
        assert (await at.get("/api/v2/me")).json["userId"] == "anonymous"
