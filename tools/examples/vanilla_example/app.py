"""The smallest application there can be: it serves a page, and does the work that the page asks for.

Run: make example-vanilla. By hand, beside `statuswire serve --config statuswire.toml`: python app.py [--port 8000]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import suppress
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from threading import Thread
from uuid import uuid4

from statuswire import JobCancelled, job

PUBLIC = Path(__file__).parent / "public"
# For the page; the worker finds the server by the same variable.
STATUSWIRE = os.environ.get("STATUSWIRE_URL", "http://127.0.0.1:3000")
MAX_PAGES = 500


def export(job_id: str, pages: int) -> None:
    """The work. However the block is left, by its end, an exception or a cancellation, that is how the job ends."""
    # A lease: should this process be killed, those who watch see it within seconds.
    with suppress(JobCancelled), job(job_id, user="anonymous", kind="export", ttl=10, raise_on_cancel=True) as j:
        for page in range(1, pages + 1):
            time.sleep(0.2)
            j.progress(100 * page / pages, f"Page {page} of {pages}", steps=(page, pages))
        j.complete(message="Ready to download", result={"pages": pages})


class Handler(SimpleHTTPRequestHandler):
    """The files in `public`, and `POST /exports {"pages": 40}`."""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/index.html"):
            return super().do_GET()
        # The page is told where the server is, so that the address stands in one place.
        page = Template((PUBLIC / "index.html").read_text()).substitute(statuswire=escape(STATUSWIRE))
        return self.answer(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())

    def do_POST(self) -> None:
        # Forms of other sites cannot send JSON, so none of them can start work in a visitor's name.
        if self.path != "/exports" or self.headers.get_content_type() != "application/json":
            return self.send_error(HTTPStatus.NOT_FOUND)
        try:
            pages = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), 1000)))["pages"]
            if not 1 <= pages <= MAX_PAGES:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            return self.send_error(HTTPStatus.BAD_REQUEST, f"pages must be 1 to {MAX_PAGES}")
        # The id is made here, before anything has happened: the page may watch a job that does not exist yet.
        job_id = f"export-{uuid4().hex[:8]}"
        # A daemon, so that Ctrl-C need not wait for it; where work must not get lost it belongs into a queue.
        Thread(target=export, args=(job_id, int(pages)), daemon=True).start()
        return self.answer(HTTPStatus.ACCEPTED, "application/json", json.dumps({"jobId": job_id}).encode())

    def answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """The terminal is for what matters."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A page with live jobs.")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    handler = partial(Handler, directory=str(PUBLIC))
    with suppress(KeyboardInterrupt), ThreadingHTTPServer(("127.0.0.1", arguments.port), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
