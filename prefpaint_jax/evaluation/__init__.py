"""Comparison of a policy with a baseline: WinRate, drift, report, curves."""
