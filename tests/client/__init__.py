"""Talking to a server with Python's own HTTP."""
