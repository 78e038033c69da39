"""Brokers: where accepted updates are kept. One interface (``base``), one module per store."""
