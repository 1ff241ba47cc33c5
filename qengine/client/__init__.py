"""Talking to an OpenAI-compatible server, ours or another, with Python's own HTTP."""
