"""Pages that commands serve or write: the guard of a server, and the frame of a report."""
