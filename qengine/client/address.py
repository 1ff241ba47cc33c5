"""Where a server is: what users type as its URL, made exact.

Invariant: an Address is an http or https server with a path prefix; `path` makes the address of any route of its API,
whether the user gave the URL with or without /v1. Nothing is looked up or connected to.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from qengine.errors import ConfigError

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """`prefix` stands in front of /v1, without a slash at its end."""

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @property
    def is_secure(self) -> bool:
        return self.scheme == "https"

    def path(self, route: str) -> str:
        """The path of `route`, such as "/v1/models"."""
        return self.prefix + route

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


def parse_address(url: str, flag: str = "--url") -> Address:
    """The address that `url` means: "localhost:8000", "http://gpu-box:8000/v1", "https://host/proxy".

    Raises:
        ConfigError: naming `flag`, what was found and what was expected.
    """
    text = url.strip()
    problem = ConfigError(f"{flag} is '{text}', expected an address such as http://127.0.0.1:8000")
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        raise problem from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None or parts.query or parts.fragment:
        raise problem
    if any(ord(char) <= 32 or ord(char) >= 127 for char in text):
        raise problem
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Address(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], prefix)
