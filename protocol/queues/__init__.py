"""What job queues say of their jobs, in our words: BullMQ, Bull 4, Celery and RQ. Bytes in, updates out, no I/O.

One module for each queue reads what it writes to Redis and says what it saw (``sighting.Sighting``);
``sighting.settle`` makes an update of that, given what is known of the job. Words are tables at the top of each module.
"""
