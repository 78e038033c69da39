"""``statuswire health``: one question to a server, for health checks of containers."""

from __future__ import annotations

from argparse import Namespace

import httpx

from server.cli import EXIT_FAILED, EXIT_OK, CommandError
from server.commands.client import message_of, open_client, reason_of

PATIENCE_S = 4.0


def run(arguments: Namespace) -> int:
    """Ask ``/health``, or ``/ready``; the exit status says it.

    Raises:
        CommandError: it is not well, or does not answer.
    """
    path = "ready" if arguments.ready else "health"
    # Nothing secret is sent, and on its own machine a server's certificate is one for another name.
    with open_client(arguments.url, None, read_timeout=PATIENCE_S, trusting=True) as client:
        try:
            answer = client.get(path)
        except httpx.HTTPError as error:
            raise CommandError(f"{arguments.url}: {reason_of(error)}") from error
    if answer.status_code != 200:
        raise CommandError(f"{arguments.url}: {message_of(answer)}", EXIT_FAILED)
    print(answer.text)
    return EXIT_OK
