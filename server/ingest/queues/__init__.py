"""Taking in what job queues say of their jobs (``protocol.queues``), from the Redis that they keep their state in."""
