"""Memory, work, traffic and time of an iteration on chips that need not be present."""
