"""Job queues and executors that report on their jobs by themselves: one module for each, two lines for the user.

    >>> from statuswire.hooks import progress
    >>> progress(45, "page 120 of 300")  # within a job; elsewhere it does nothing

Nothing here breaks or delays a job: what goes wrong in a hook is logged, and news is sent in the background.
"""

from __future__ import annotations

from statuswire.hooks.reporting import current_job, progress

__all__ = ["current_job", "progress"]
