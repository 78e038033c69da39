"""Carrying all records and their history from one store to another, as lines of JSON."""
