"""For all tests."""

from __future__ import annotations

import signal

# A shell starts what it puts in the background with SIGINT ignored, and every child inherits that: here it must work,
# as commands are tested with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
