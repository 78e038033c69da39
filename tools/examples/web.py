"""An application whose page shows its jobs live, and statuswire: everything that an example needs, by one command.

Run: python -m tools.examples.web vanilla|react|fastapi|django|nginx [--port 8000]
`make example-vanilla` and the others install what each needs first. Ctrl-C ends all of it; what it kept goes with it.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tools.examples.nginx_example import NGINX, configure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent
# What applications are made of has no business in the server's own place; see the Makefile.
APPLICATIONS = ROOT / ".venv" / "examples" / "bin" / "python"
PATIENCE_S = 60


class Failed(Exception):
    """Something did not start, in words for the terminal."""


@dataclass
class Stage:
    """Where an example runs.

    Attributes:
        port: of the address to open.
        directory: for all that is kept; it goes when the example ends.
        built: what is built is served, not what it is built from.
        processes: what was started, in this order.
    """

    port: int
    directory: Path
    built: bool = False
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *command: str | Path, **environ: str) -> None:
        """Run something until the example ends."""
        # Ends of jobs that are yet to be sent go with the example, too.
        environment = os.environ | {"STATUSWIRE_SPOOL_DIR": str(self.directory / "spool")} | environ
        # Its own start line would be a second address to wonder about; logs and errors go to stderr.
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=self.directory, env=environment, stdin=quiet, stdout=quiet)
        self.processes.append(process)

    def serve(self, config: Path, **environ: str) -> str:
        """Start statuswire on its embedded store, with an example's configuration; its address."""
        port = free_port()
        self.start(
            *(BIN / "statuswire", "serve", "--log-level", "warning", "--config", config),
            *("--store", f"sqlite:{self.directory / 'statuswire.db'}"),
            STATUSWIRE_SERVER_PORT=str(port),
            **environ,
        )
        return f"http://127.0.0.1:{port}"

    def wait(self, url: str) -> None:
        """Until it answers, whatever it answers."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                return
            except urllib.error.HTTPError as answer:
                answer.close()
                return
            except OSError:
                if any(process.poll() is not None for process in self.processes):
                    raise Failed("one of the processes did not start") from None
                if time.monotonic() > give_up:
                    raise Failed(f"{url} does not answer") from None
                time.sleep(0.05)

    def end(self) -> None:
        """The last one first: nothing loses what it stands on."""
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """One that nobody listens on now, and below those that systems give to outgoing connections until it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def vanilla(stage: Stage) -> None:
    """A page without a framework."""
    place = HERE / "vanilla_example"
    url = stage.serve(place / "statuswire.toml", STATUSWIRE_CORS_ORIGINS=stage.url)
    stage.wait(f"{url}/health")
    stage.start(BIN / "python", place / "app.py", "--port", str(stage.port), STATUSWIRE_URL=url)


def react(stage: Stage) -> None:
    """React with Vite: its server for development, which shows what is changed in src/, or what it builds."""
    place = HERE / "react_example"
    vite = place / "node_modules" / "vite" / "bin" / "vite.js"
    statuswire, application = stage.serve(place / "statuswire.toml"), free_port()
    environ = {"STATUSWIRE_ORIGIN": statuswire, "APPLICATION_URL": f"http://127.0.0.1:{application}"}
    stage.wait(statuswire)
    # The work is that of the page without a framework.
    app = HERE / "vanilla_example" / "app.py"
    stage.start(BIN / "python", app, "--port", str(application), STATUSWIRE_URL=f"{statuswire}/status")
    stage.wait(environ["APPLICATION_URL"])
    command: tuple[str | Path, ...] = ("node", vite)
    if stage.built:
        out = stage.directory / "dist"
        subprocess.run([*command, "build", place, "--outDir", out, "--emptyOutDir", "--logLevel", "warn"], check=True)
        command = (*command, "preview", "--outDir", out)
    listen = ("--host", "127.0.0.1", "--port", str(stage.port), "--strictPort", "--clearScreen", "false")
    stage.start(*command, place, *listen, **environ)


def fastapi(stage: Stage) -> None:
    """Sessions of an application, by the auth hook."""
    place = HERE / "fastapi_example"
    url, token = with_sessions(stage, place / "statuswire.toml", stage.port)
    start_fastapi(stage, stage.port, STATUSWIRE_URL=url, STATUSWIRE_TOKEN=token)


def start_fastapi(stage: Stage, port: int, **environ: str) -> None:
    uvicorn = (
        APPLICATIONS,
        "-m",
        "uvicorn",
        "app:app",
        "--app-dir",
        HERE / "fastapi_example",
        "--log-level",
        "warning",
    )
    stage.start(*uvicorn, "--port", str(port), **environ)


def nginx(stage: Stage) -> None:
    """The same application and statuswire on one origin, by nginx; between the two a Unix socket."""
    if NGINX is None:
        raise Failed("nginx is not there: run `make system`")
    behind, path = free_port(), stage.directory / "statuswire.sock"
    environ = {
        "STATUSWIRE_SERVER_BASE_PATH": "/status",
        "STATUSWIRE_SERVER_UNIX_SOCKET": str(path),
        "STATUSWIRE_SERVER_TRUSTED_PROXIES": "unix",
        "STATUSWIRE_CORS_ORIGINS": "",
    }
    _, token = with_sessions(stage, HERE / "fastapi_example" / "statuswire.toml", behind, **environ)
    public = f"{stage.url}/status"
    start_fastapi(stage, behind, STATUSWIRE_URL=public, PUBLIC_STATUSWIRE_URL="/status", STATUSWIRE_TOKEN=token)
    stage.wait(f"http://127.0.0.1:{behind}")
    listen, application = f"127.0.0.1:{stage.port}", f"127.0.0.1:{behind}"
    configuration = configure(stage.directory, "site-base-path.conf", listen, f"unix:{path}", application)
    stage.start(NGINX, "-e", "stderr", "-p", stage.directory, "-c", configuration)


def django(stage: Stage) -> None:
    """Django's own sessions, by the auth hook."""
    place = HERE / "django_example"
    url, token = with_sessions(stage, place / "statuswire.toml", stage.port)
    manage = (APPLICATIONS, place / "manage.py")
    environ = {
        "DJANGO_DATABASE": str(stage.directory / "django.db"),
        "STATUSWIRE_URL": url,
        "STATUSWIRE_TOKEN": token,
    }
    for command in ("migrate", "add_users"):
        subprocess.run([*manage, command, "--verbosity", "0"], env=os.environ | environ, check=True)
    # Without the reloader, which would be another process; it serves each request in a thread, as the hook needs.
    stage.start(*manage, "runserver", "--noreload", "--verbosity", "0", f"127.0.0.1:{stage.port}", **environ)


def with_sessions(stage: Stage, config: Path, application: int, **more: str) -> tuple[str, str]:
    """statuswire that asks the application, at a port, who somebody is; its address, and a token for workers."""
    key = stage.directory / "statuswire.key"
    key.write_text(secrets.token_hex(32))
    environ = {
        "STATUSWIRE_AUTH_JWT_KEY_FILE": str(key),
        "STATUSWIRE_AUTH_HOOK_URL": f"http://127.0.0.1:{application}/statuswire/who",
        "STATUSWIRE_CORS_ORIGINS": stage.url,
    } | more
    url = stage.serve(config, **environ)
    # What it may do: report on jobs of everyone, and end connections. It sees no job itself.
    command = (BIN / "statuswire", "token", "--sub", "exports", "--capability", "publish", "--capability", "ops")
    done = subprocess.run(command, env=os.environ | environ, cwd=stage.directory, capture_output=True, check=True)
    stage.wait(url)
    return url, done.stdout.decode().strip()


EXAMPLES: Mapping[str, Callable[[Stage], None]] = {
    "vanilla": vanilla,
    "react": react,
    "fastapi": fastapi,
    "django": django,
    "nginx": nginx,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="A page with live jobs.")
    parser.add_argument("kind", choices=EXAMPLES)
    parser.add_argument("--port", type=int, default=8000, help="of the address to open (8000); 0 takes any free one")
    parser.add_argument("--built", action="store_true", help="React: serve what Vite builds, not its sources")
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="statuswire-example-") as directory:
        stage = Stage(arguments.port or free_port(), Path(directory), arguments.built)
        try:
            with socket.socket() as taken:
                if taken.connect_ex(("127.0.0.1", stage.port)) == 0:
                    raise Failed(f"port {stage.port} is taken: choose another one with --port")
            EXAMPLES[arguments.kind](stage)
            stage.wait(stage.url)
            print(f"Open {stage.url} in a browser. Ctrl-C ends it.", flush=True)
            while not any(process.poll() is not None for process in stage.processes):
                time.sleep(0.2)
            raise Failed("one of the processes has ended")
        except KeyboardInterrupt:
            print()
        except Failed as failure:
            print(f"example-{arguments.kind}: {failure}", file=sys.stderr)
            return 1
        finally:
            # From here on a second one must not leave something behind.
            for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(ending, signal.SIG_IGN)
            stage.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
