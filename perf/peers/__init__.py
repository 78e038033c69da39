"""This server beside others with the same job, in one run: `python -m perf.peers` (make bench-peers)."""
