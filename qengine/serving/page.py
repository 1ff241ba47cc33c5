"""The web page at `/`: files of the package, read once and answered from memory.

Invariant: these are the only files that can be reached, by their exact names; a path is never made into a file's name.
They hold nothing of this server's, so they need no key, and their headers let them load from and talk to it alone. The
page gets everything else through the API, like any client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from fastapi import APIRouter, Request
from starlette.responses import Response

_FOLDER = "web"
_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": _POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        # Asked for each time and answered with 304: a new version of the server is never mixed with an old page.
        "Cache-Control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True)
class _Asset:
    body: bytes
    media_type: str
    etag: str


def _read_assets() -> dict[str, _Asset]:
    assets = {}
    for file in resources.files("qengine.serving").joinpath(_FOLDER).iterdir():
        media_type = _TYPES.get(f".{file.name.rpartition('.')[2]}")
        if media_type is not None:
            body = file.read_bytes()
            path = "/" if file.name == _INDEX else f"/{_FOLDER}/{file.name}"
            assets[path] = _Asset(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return assets


_ASSETS: Mapping[str, _Asset] = MappingProxyType(_read_assets())
#: What is answered without a key.
PAGE_PATHS = frozenset(_ASSETS)


async def _serve(http: Request) -> Response:
    asset = _ASSETS[http.scope["path"]]
    headers = {**HEADERS, "ETag": asset.etag}
    if http.headers.get("if-none-match") == asset.etag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers=headers, media_type=asset.media_type)


router = APIRouter()
for _path in sorted(PAGE_PATHS):
    router.add_api_route(_path, _serve, methods=["GET", "HEAD"], include_in_schema=False)
