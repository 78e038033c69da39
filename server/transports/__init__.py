"""Ways of reading: one module each, all over the same hub, log and cursor."""
