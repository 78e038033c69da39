"""An HTTP server on a loopback socket that answers one request after the other as a test says, and remembers them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support import PATIENCE_S


@dataclass
class Seen:
    """One request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """What to answer: a whole body, or pieces of a stream that ends when they are used up.

    ``hold`` keeps the connection open after the pieces, until the client leaves or the server stops; ``drop`` breaks
    the connection off instead of ending the body; without a status nothing is answered at all.
    """

    status: int | None = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pieces: list[bytes | Callable[[], object]] | None = None
    hold: bool = False
    drop: bool = False


class ScriptedServer:
    def __init__(self, answers: list[Answer]) -> None:
        self.answers = iter(answers)
        self.seen: list[Seen] = []
        self.stopping = threading.Event()
        self.held = threading.Event()  # set when an answer with ``hold`` has been written
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def do_GET(self) -> None:
                outer.answer(self)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.seen.append(Seen(handler.command, handler.path, headers, body))
        answer = next(self.answers, Answer(410, body=b"the script is over"))
        handler.close_connection = True
        if answer.status is None:
            return
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if answer.pieces is None:
            if answer.status != 204:
                handler.send_header("Content-Length", str(len(answer.body)))
            handler.end_headers()
            handler.wfile.write(answer.body)
            return
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in answer.pieces:
            if callable(piece):
                piece()
            else:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                handler.wfile.flush()
        if answer.hold:
            self.held.set()
            self.stopping.wait(PATIENCE_S)
        elif not answer.drop:
            handler.wfile.write(b"0\r\n\r\n")


@contextmanager
def scripted(*answers: Answer) -> Iterator[ScriptedServer]:
    server = ScriptedServer(list(answers))
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def as_json(status: int, value: object, **headers: str) -> Answer:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, {"Content-Type": "application/json"} | named, json.dumps(value).encode())


def error(status: int, code: str, message: str, **headers: str) -> Answer:
    return as_json(status, {"error": {"code": code, "message": message, "requestId": "r1"}}, **headers)


def stream(*pieces: bytes | Callable[[], object], hold: bool = False, drop: bool = False) -> Answer:
    return Answer(200, {"Content-Type": "text/event-stream"}, pieces=list(pieces), hold=hold, drop=drop)


def sse(message: dict[str, Any], cursor: str | None = None, retry: int | None = None) -> bytes:
    lines = [f"retry: {retry}\n"] if retry is not None else []
    lines += [f"id: {cursor}\n"] if cursor is not None else []
    return ("".join(lines) + f"data: {json.dumps(message)}\n\n").encode()
