"""``statuswire publish``: one update of a job over HTTP, sent again until it is answered, and counted once."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from urllib.parse import quote
from uuid import uuid4

import httpx
import msgspec

from server.cli import EXIT_OK, EXIT_USAGE, CommandError
from server.commands.client import PASSING, is_hopeless, jittered, message_of, open_client, reason_of, retry_after

# Six tries wait 8 s on average and 16 s at most, long enough for a server to be restarted under a running worker.
ATTEMPTS = 6
BASE_DELAY = 0.5
MAX_DELAY = 8.0
# What the server may ask for in addition, each time: a worker cannot wait for minutes to say how far it is.
MAX_ASKED_DELAY = 30.0
# A store that is slow to commit answers within a few seconds or not at all.
READ_TIMEOUT = 15.0


def run(arguments: Namespace) -> int:
    """Publish and print the answer.

    Raises:
        CommandError: with the server's message, or why there was no answer.
    """
    update = _update(arguments)
    body = msgspec.json.encode(update)
    # The same key with every try: the server counts them as one, also if it was the answer that got lost.
    headers = {"Idempotency-Key": uuid4().hex, "Content-Type": "application/json"}
    path = f"api/v2/jobs/{quote(arguments.job, safe='')}/updates"
    with open_client(arguments.url, arguments.token, read_timeout=READ_TIMEOUT) as client:
        for attempt in range(ATTEMPTS):
            delay = jittered(attempt, base=BASE_DELAY, cap=MAX_DELAY)
            try:
                response = client.post(path, content=body, headers=headers)
            except httpx.RequestError as error:
                problem = f"no connection to {arguments.url}: {reason_of(error)}"
                if is_hopeless(error):
                    break
            else:
                if response.is_success:
                    print(response.text.strip())
                    return EXIT_OK
                problem = message_of(response)
                if b'"job_not_found"' in response.content and "userId" not in update:
                    problem += "; with --user, its owner, it is made"
                if response.status_code not in PASSING:
                    break
                delay += min(retry_after(response) or 0.0, MAX_ASKED_DELAY)
            if attempt + 1 < ATTEMPTS:
                time.sleep(delay)
    raise CommandError(problem)


def _update(arguments: Namespace) -> dict[str, object]:
    update: dict[str, object] = {}
    if arguments.data is not None:
        text = sys.stdin.read() if arguments.data == "-" else arguments.data
        try:
            decoded = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise CommandError(f"--data is not JSON: {error}", EXIT_USAGE) from error
        if not isinstance(decoded, dict):
            raise CommandError("--data: expected a JSON object of fields", EXIT_USAGE)
        update.update(decoded)
    progress: float | None = arguments.progress
    named = {
        "userId": arguments.user,
        "status": arguments.status,
        "progress": int(progress) if progress is not None and progress.is_integer() else progress,
        "message": arguments.message,
        "stage": arguments.stage,
    }
    update.update((name, value) for name, value in named.items() if value is not None)
    return update
