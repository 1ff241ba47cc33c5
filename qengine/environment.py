"""The one module that reads environment variables.

Invariant: a variable that is set but empty counts as unset. It changes nothing in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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


def cache_folder() -> Path:
    """QENGINE_CACHE_DIR, or this project's place in the user's cache folder."""
    chosen = os.environ.get("QENGINE_CACHE_DIR")
    users = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else (Path(users) if users else Path.home() / ".cache") / "qengine"


def nccl_p2p_disabled() -> bool:
    """NCCL_P2P_DISABLE, which NCCL reads itself: whether the user has already turned off copies from card to card."""
    return os.environ.get("NCCL_P2P_DISABLE", "") not in ("", "0")


def for_child(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process: ours, and `more`."""
    return {**os.environ, **more}
