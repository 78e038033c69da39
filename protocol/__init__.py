"""The words and rules of statuswire, without I/O: bytes in, events out; no sockets, no tasks, no clock."""
