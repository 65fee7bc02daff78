"""Comparisons of a policy with its base: WinRate, drift, report, curves."""
