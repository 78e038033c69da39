"""Taking updates from where workers put them without HTTP: channels and a stream in Redis."""
