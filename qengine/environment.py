"""The one module that reads environment variables.

Invariant: a variable that is set but empty counts as unset. It changes nothing in the environment.
"""

from __future__ import annotations

import os
from pathlib import Path


def api_key() -> str | None:
    """QENGINE_API_KEY: the server's key, kept out of the process list."""
    return os.environ.get("QENGINE_API_KEY") or None


def log_level(default: str = "info") -> str:
    """QENGINE_LOG_LEVEL: debug, info, warning or error."""
    return (os.environ.get("QENGINE_LOG_LEVEL") or default).lower()


def no_color() -> bool:
    """NO_COLOR, as everywhere: set means plain text."""
    return bool(os.environ.get("NO_COLOR"))


def hub_offline() -> bool:
    """HF_HUB_OFFLINE, as everywhere: never ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def cache_dir() -> Path:
    """QENGINE_CACHE_DIR, or else the user's cache folder: what can be made again, and the chat's history."""
    own = os.environ.get("QENGINE_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "qengine"
