"""A real nginx in front of what is tested."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.support import until
from tools.examples.nginx_example import NGINX

# What it would keep outside of its directory, if it were let.
_KEPT = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def write_configuration(directory: Path, http: str, *, main: str = "", events: str = "") -> Path:
    """Write an ``nginx.conf`` that keeps everything in its directory.

    Args:
        http: what stands in the block of that name; the other two likewise.
    """
    paths = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in _KEPT)
    file = directory / "nginx.conf"
    file.write_text(
        f"daemon off; error_log stderr notice; pid {directory}/nginx.pid; {main}\n"
        f"events {{ {events} }}\n"
        f"http {{\n{paths}access_log off;\n{http}\n}}\n"
    )
    return file


@asynccontextmanager
async def running_nginx(configuration: Path) -> AsyncIterator[trio.Process]:
    """Run it with a configuration, from when it listens. Its log is ``nginx.log`` beside that, its ``pid`` likewise."""
    assert NGINX, "nginx is not there: run `make system`"
    directory = configuration.parent
    log, listens = directory / "nginx.log", directory / "nginx.pid"  # written once its sockets are open
    with log.open("ab") as stderr:
        process = await trio.lowlevel.open_process(
            [NGINX, "-e", "stderr", "-p", str(directory), "-c", str(configuration)], stderr=stderr
        )
    try:
        await until(lambda: process.poll() is not None or listens.exists())
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            await process.wait()
