"""Who can reach a server, and whether its keys deserve the name: rules about options alone.

Invariant: light, so that a refused option is refused before anything heavy loads. Requests are judged by `auth`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from qengine.errors import ConfigError

MIN_KEY_LEN = 4
_KEY = re.compile(r"[!-~]+")


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(key: str, source: str) -> str:
    """The key itself, unless it protects nothing or no client could send it. `source` says where it came from.

    Raises:
        ConfigError: without the key in the message.
    """
    if len(key) < MIN_KEY_LEN:
        length = "empty" if not key else f"{len(key)} characters long"
        raise ConfigError(f"{source}: a key is {length}, expected at least {MIN_KEY_LEN} characters")
    if _KEY.fullmatch(key) is None:
        raise ConfigError(f"{source}: a key has characters other than printable ASCII without spaces")
    return key


def check_exposure(host: str, keys: Sequence[str], allow_no_auth: bool) -> None:
    """Refuse to let other machines in without a key, unless that is wanted.

    Raises:
        ConfigError: `host` can be reached from outside, and there is neither a key nor `allow_no_auth`.
    """
    if keys or allow_no_auth or is_loopback(host):
        return
    raise ConfigError(
        f"--host {host} lets other machines reach this server, but there is no API key; "
        "give --api-key, or --allow-no-auth if the network is trusted"
    )
