"""Tries a running server."""
