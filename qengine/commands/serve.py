"""`qengine serve`: hands the checked options to the HTTP server, which owns the process until it ends."""

from __future__ import annotations

from qengine.commands.settings import ServeSettings
from qengine.serving.server import run_server


def run(settings: ServeSettings) -> int:
    """Serve until stopped. Returns the exit code. Raises ConfigError or LoadError before it listens."""
    return run_server(settings.engine, settings.server)
