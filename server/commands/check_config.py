"""``statuswire check-config``: everything that ``serve`` would check, without serving."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

from server.cli import EXIT_OK, flags_of
from server.config_load import describe, find_config_file, load_with_sources
from server.keys import load_keys
from server.tls import load_context


def run(arguments: Namespace) -> int:
    """Print the configuration in effect as TOML, with where each value came from.

    Raises:
        ConfigError: the server could not start with it.
    """
    file = find_config_file(arguments.config, Path())
    config, sources = load_with_sources(flags_of(arguments), os.environ, file)
    load_keys(config.auth)
    load_context(config.server)
    sys.stdout.write(describe(config, sources))
    return EXIT_OK
