"""``statuswire token``: sign an access token (RFC 7519) with the configured key; no server is asked."""

from __future__ import annotations

import math
import os
import time
from argparse import Namespace
from pathlib import Path

from protocol.fields import is_id
from server.cli import EXIT_OK, EXIT_USAGE, CommandError, flags_of
from server.config_load import find_config_file, load_config
from server.keys import sign_token


def run(arguments: Namespace) -> int:
    """Print a token.

    Raises:
        ConfigError: there is no key, or none that can sign.
        CommandError: a user that no server would take.
    """
    if not is_id(arguments.sub):
        rule = "1 to 128 characters of A-Z a-z 0-9 _ . : @ -"
        raise CommandError(f"--sub {arguments.sub!r}: a user is {rule}", EXIT_USAGE)
    config = load_config(flags_of(arguments), os.environ, find_config_file(arguments.config, Path()))
    # No iat: a server whose clock is a little behind ours would refuse the token as one from the future.
    claims: dict[str, object] = {"sub": arguments.sub, "exp": math.ceil(time.time() + arguments.ttl)}
    if arguments.admin:
        claims["admin"] = True
    if arguments.capability:
        claims["capabilities"] = sorted(set(arguments.capability))
    if arguments.job:
        claims["jobs"] = arguments.job
    if config.auth.jwt_audience:
        claims["aud"] = config.auth.jwt_audience
    if config.auth.jwt_issuer:
        claims["iss"] = config.auth.jwt_issuer
    print(sign_token(config.auth, claims))
    return EXIT_OK
