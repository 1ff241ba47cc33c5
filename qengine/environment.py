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


def for_rank(num_threads: int) -> dict[str, str]:
    """The environment of a process that runs one rank: ours without keys, its share of threads, and local sockets.

    Python finds the packages that this process runs, and nothing in the folder where it happens to be started.
    """
    variables = dict(os.environ)
    variables.pop("QENGINE_API_KEY", None)
    path = [str(Path(__file__).parent.parent), variables.get("PYTHONPATH", "")]
    variables.update(
        OMP_NUM_THREADS=str(num_threads),
        PYTHONPATH=os.pathsep.join(part for part in path if part),
        PYTHONSAFEPATH="1",
        # All ranks are on this machine: what they open must not be seen from others.
        GLOO_SOCKET_IFNAME="lo",
        NCCL_SOCKET_IFNAME="lo",
    )
    return variables


def cache_dir() -> Path:
    """QENGINE_CACHE_DIR, or else the user's cache folder: what can be made again, and the chat's history."""
    own = os.environ.get("QENGINE_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "qengine"


def nccl_p2p_disabled() -> bool:
    """NCCL_P2P_DISABLE, which NCCL reads itself: whether the user has already turned off copies from card to card."""
    return os.environ.get("NCCL_P2P_DISABLE", "") not in ("", "0")
