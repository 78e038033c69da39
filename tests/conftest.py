"""For all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# How long an example takes depends on what else the machine does, which is no property of what is tested.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A shell starts what it puts in the background with SIGINT ignored, and every child inherits that: here it must work,
# as commands are tested with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
