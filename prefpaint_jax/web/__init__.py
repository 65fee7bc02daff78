"""Pages that commands serve: the guard of a server, and its start."""
