"""``statuswire serve``."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import trio

from server import logs
from server.app import serve
from server.cli import flags_of
from server.config import Config
from server.config_load import find_config_file, load_config


def run(arguments: Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: the server cannot start with this configuration.
    """

    def load() -> Config:
        return load_config(flags_of(arguments), os.environ, find_config_file(arguments.config, Path()))

    config = load()
    logs.configure(config.log)
    if config.server.workers > 1:
        # Imported here: it is for those who ask for it.
        from server.workers import supervise

        return supervise(config, load)
    return trio.run(serve, config, load)
