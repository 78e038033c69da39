"""``statuswire export``: all that is in a store, as lines of JSON; see ``server.transfer.lines``."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import IO

import trio

from server.cli import EXIT_OK, EXIT_USAGE, CommandError, flags_of
from server.config import Config
from server.config_load import find_config_file, load_config
from server.transfer import redis_store, sqlite_store
from server.transfer.lines import TransferError, Writer


def run(arguments: Namespace) -> int:
    """Write the lines to a file, which appears when it is whole, or to standard output.

    Raises:
        ConfigError: the configuration is wrong.
        CommandError: it cannot be exported.
    """
    config = configured(arguments)
    try:
        if arguments.file == "-":
            writer = _export(config, sys.stdout.buffer)
        else:
            path = Path(arguments.file)
            part = path.with_name(path.name + ".part")
            try:
                with part.open("wb") as file:
                    writer = _export(config, file)
                    os.fsync(file.fileno())
                part.rename(path)
            except OSError as error:
                raise TransferError(f"{path} cannot be written: {error.strerror}") from None
            finally:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
    except TransferError as error:
        raise CommandError(str(error)) from None
    print(f"exported {writer.jobs} jobs and {writer.updates} updates", file=sys.stderr)
    return EXIT_OK


def configured(arguments: Namespace) -> Config:
    """The configuration, whose store must be one that keeps something.

    Raises:
        ConfigError, CommandError: it is not.
    """
    config = load_config(flags_of(arguments), os.environ, find_config_file(arguments.config, Path()))
    if config.store.kind == "memory":
        raise CommandError("store.url: memory: keeps nothing; name sqlite:PATH or redis://HOST", EXIT_USAGE)
    return config


def _export(config: Config, file: IO[bytes]) -> Writer:
    if config.store.kind == "sqlite":
        return sqlite_store.export(config, file)
    return trio.run(redis_store.export, config, file)
