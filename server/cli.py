"""The command line: which commands and options there are; each command itself is a module of ``server.commands``.

The modules of a command are imported when it runs, so that ``statuswire token`` does not wait for an HTTP client nor
``statuswire serve`` for a terminal library. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from server.config import ConfigError
from server.config_load import FLAGS

DEFAULT_URL = "http://127.0.0.1:3000"
CAPABILITIES = ("publish", "notify", "ops")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class CommandError(Exception):
    """Ends a command: the message goes to stderr on one line, ``code`` is the exit status."""

    def __init__(self, message: str, code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 usage or configuration, 130 interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        name = arguments.module
        command = importlib.import_module(name if "." in name else f"server.commands.{name}")
        status: int = command.run(arguments)
        if sys.stdout is not None:  # as where descriptor 1 is closed
            sys.stdout.flush()
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except CommandError as error:
        return _fail(str(error), error.code)
    except BrokenPipeError:
        # The reader of our output has left, as `head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


def _fail(message: str, code: int) -> int:
    # Messages quote what a server or a file said.
    line = " ".join(message.split())
    print(f"statuswire: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"statuswire: {message}; see `{self.prog} --help`\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from importlib.metadata import version

        print(f"statuswire {version('statuswire')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="statuswire", description="Live status of jobs, from their workers to everyone who watches.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, module: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        made.set_defaults(module=module)
        return made

    _server_options(command("serve", "serve", "run the server"))
    _server_options(command("check-config", "check_config", "check the configuration and print what is in effect"))
    _transfer_options(command("export", "export", "write all jobs and their history as lines of JSON"), "write to")
    importing = command("import", "import_", "fill an empty store with what was exported")
    _transfer_options(importing, "read from")
    importing.add_argument(
        "--new-epoch",
        action="store_true",
        help="for putting a backup back: readers that have seen what came after it start anew",
    )
    _token_options(command("token", "token", "sign an access token with the configured key and print it"))
    _publish_options(command("publish", "publish", "publish one update of a job and print the answer"))
    # It is a worker: of the package for workers, in no part of the server.
    _run_options(command("run", "statuswire.running", "run a command as a job: its exit status is how the job ends"))
    _health_options(command("health", "health", "ask a server whether it is well; the exit status says it"))
    _watch_options(command("watch", "watch", "follow jobs live, until the named ones have ended"))
    return parser


def _server_options(parser: argparse.ArgumentParser) -> None:
    helps = {
        "server.host": "address to listen on (127.0.0.1)",
        "server.port": "port to listen on (3000); 0 takes any free one",
        "server.unix_socket": "Unix socket to listen on; alone it replaces TCP",
        "server.workers": "number of processes (1)",
        "store.url": "memory:, sqlite:PATH (sqlite:statuswire.db) or redis://HOST",
        "auth.jwt_key": "secret or PEM key for tokens; other users of this machine can see flags, a jwt_key_file or "
        "STATUSWIRE_AUTH_JWT_KEY is safer",
        "auth.jwt_algorithm": "the algorithm that is accepted (HS256 for a secret)",
        "log.level": "debug, info, warning or error (info)",
    }
    _config_option(parser)
    for name, flag in FLAGS.items():
        parser.add_argument(flag, dest=name, metavar="VALUE", help=helps[name])


def _transfer_options(parser: argparse.ArgumentParser, does: str) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        default="-",
        metavar="FILE",
        help=f"{does} it; - is standard {'output' if does == 'write to' else 'input'}",
    )
    _config_option(parser)
    parser.add_argument("--store", dest="store.url", metavar="URL", help="the store, if it is not the configured one")


def _token_options(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    for name in ("auth.jwt_key", "auth.jwt_algorithm"):
        parser.add_argument(FLAGS[name], dest=name, metavar="VALUE", help="overrides the configuration")
    parser.add_argument("--sub", required=True, metavar="USER", help="the user the token speaks for")
    parser.add_argument("--admin", action="store_true", help="sees every job and has every capability")
    parser.add_argument(
        "--capability", action="append", default=[], choices=CAPABILITIES, help="may be given several times"
    )
    parser.add_argument(
        "--job", action="append", default=[], metavar="ID", help="a foreign job (or export-*) it may read; repeatable"
    )
    parser.add_argument(
        "--ttl", type=_number(above=0), default=86_400.0, metavar="SECONDS", help="how long it is valid (86400, a day)"
    )
    _client_options(parser)


def _publish_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--user", metavar="U", help="owner; needed to create the job")
    parser.add_argument("--status", metavar="S", help="queued, processing, completed, failed or cancelled")
    parser.add_argument("--progress", type=_number(), metavar="P", help="0 to 100")
    parser.add_argument("--message", metavar="M")
    parser.add_argument("--stage", metavar="S")
    parser.add_argument("--data", metavar="JSON", help='further fields, {"kind":"export","result":{…}}; - reads stdin')
    _client_options(parser)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--job", metavar="JOB", help="the job's id (the command's name and something random)")
    parser.add_argument("--user", metavar="U", help="owner; needed to create the job")
    parser.add_argument("--kind", metavar="K", help="(the command's name)")
    parser.add_argument("--attempt", type=int, metavar="N", help="which attempt it is, if it is not the first")
    parser.add_argument(
        "--ttl", type=_number(least=0), default=30.0, metavar="SECONDS",
        help="its death shows so soon after this process dies (30); 0 for never",
    )  # fmt: skip
    parser.add_argument(
        "--pattern", metavar="REGEX",
        help="progress in its output: groups percent, or done and total (45%%, 120/300 and 3 of 8 are found)",
    )  # fmt: skip
    _client_options(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="and its arguments")


def _watch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--all", action="store_true", help="every job that the token may see")
    parser.add_argument("--user", metavar="U", help="every job of this user")
    parser.add_argument("--json", action="store_true", help="print every event as it came, one JSON object per line")
    parser.add_argument("--exit", action="store_true", help="with --all or --user: leave when no job is running")
    _client_options(parser)


def _health_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ready", action="store_true", help="whether it should get traffic, not only whether it lives")
    parser.add_argument(
        "--url",
        default=os.environ.get("STATUSWIRE_URL") or DEFAULT_URL,
        help=f"the server, with its base path (STATUSWIRE_URL, else {DEFAULT_URL})",
    )


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file (./statuswire.toml if it is there)")


def _client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=os.environ.get("STATUSWIRE_URL") or DEFAULT_URL,
        help=f"the server, with its base path (STATUSWIRE_URL, else {DEFAULT_URL})",
    )
    parser.add_argument(
        "--token", default=os.environ.get("STATUSWIRE_TOKEN") or None, help="access token (STATUSWIRE_TOKEN)"
    )


def _number(above: float = -math.inf, least: float = -math.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and value > above and value >= least):
            raise ValueError(text)
        return value

    return number


def flags_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that are configuration keys, as ``load_config`` takes them."""
    return {name: value for name, value in vars(arguments).items() if name in FLAGS}
