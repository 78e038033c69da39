"""Benchmarks of the whole server, beside the bare limit of the same machine in the same run. See README.md."""
