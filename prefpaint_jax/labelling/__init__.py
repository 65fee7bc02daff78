"""Scores of people: the store, the server, the report, the order."""
