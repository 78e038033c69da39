"""Names for requests and clients: unique among all processes, and cheap."""

from __future__ import annotations

import os
import secrets
from itertools import count
from typing import Final

# A random name per process and a number: 0.1 µs, where a random one each time costs 1.5 µs and as much of every request
# as its routing. They need not be secret.
_process = secrets.token_hex(4)
_NUMBERS: Final = count(1)


def _begin_anew() -> None:
    global _process
    _process = secrets.token_hex(4)


os.register_at_fork(after_in_child=_begin_anew)


def new_id() -> str:
    """16 hexadecimal digits or more, never the same twice."""
    return f"{_process}{next(_NUMBERS):08x}"
