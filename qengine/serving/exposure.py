"""Who can reach a server, whether its keys deserve the name, and what it shows of itself: rules about options alone.

Invariant: light, so that a refused option is refused before anything heavy loads. Requests are judged by `auth`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from qengine.errors import ConfigError

MIN_KEY_LEN = 4
_KEY = re.compile(r"[!-~]+")
_METRIC_PREFIX = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


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


def check_origin(origin: str) -> None:
    """Refuse what no browser sends as an Origin, for it would never match.

    Raises:
        ConfigError: it is neither "*" nor scheme, host and perhaps port.
    """
    if origin != "*" and not _is_url(origin, with_path=False):
        raise ConfigError(
            f"--allowed-origins has '{origin}', expected a site without a path such as https://example.org, or *"
        )


def check_endpoint(url: str) -> None:
    """Raise ConfigError unless `url` is one that traces can be sent to."""
    if not _is_url(url, with_path=True):
        raise ConfigError(
            f"--otlp-endpoint is '{url}', expected the URL of a collector such as http://localhost:4318/v1/traces"
        )


def _is_url(text: str, *, with_path: bool) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port  # Raises for a port that is none.
    except ValueError:
        return False
    has_more = bool(parts.query or parts.fragment or parts.username is not None or (parts.path and not with_path))
    return not has_more and parts.scheme in ("http", "https") and bool(parts.hostname)


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that Prometheus would not take in a name.

    Raises:
        ConfigError: it has other characters.
    """
    if _METRIC_PREFIX.fullmatch(prefix) is None:
        raise ConfigError(
            f"--metrics-prefix is '{prefix}', expected letters, digits, underscores and colons, such as vllm:"
        )
