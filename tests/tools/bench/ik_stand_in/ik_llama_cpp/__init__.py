"""Stands in for the wheel's package in tests: found by PYTHONPATH."""

__version__ = "0.0-scripted"
