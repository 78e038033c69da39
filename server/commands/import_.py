"""``statuswire import``: fill an empty store with what ``statuswire export`` wrote."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import IO

import msgspec
import trio

from server.brokers.local import new_epoch
from server.cli import EXIT_OK, CommandError
from server.commands.export import configured
from server.config import Config
from server.transfer import redis_store, sqlite_store
from server.transfer.lines import Reader, TransferError


def run(arguments: Namespace) -> int:
    """Read the lines from a file or from standard input.

    Raises:
        ConfigError: the configuration is wrong.
        CommandError: it cannot be imported, and nothing was.
    """
    config = configured(arguments)
    try:
        if arguments.file == "-":
            reader = _import(config, sys.stdin.buffer, arguments.new_epoch)
        else:
            try:
                file = open(arguments.file, "rb")  # noqa: SIM115 - closed below
            except OSError as error:
                raise CommandError(f"{arguments.file} cannot be read: {error.strerror}") from None
            with file:
                reader = _import(config, file, arguments.new_epoch)
    except TransferError as error:
        raise CommandError(str(error)) from None
    print(f"imported {reader.jobs} jobs and {reader.updates} updates", file=sys.stderr)
    return EXIT_OK


def _import(config: Config, file: IO[bytes], anew: bool) -> Reader:
    reader = Reader(file)
    if anew:
        reader.header = msgspec.structs.replace(reader.header, epoch=new_epoch())
    if config.store.kind == "sqlite":
        sqlite_store.import_(config, reader)
    else:
        trio.run(redis_store.import_, config, reader)
    return reader
