"""From an HTTP request to the checked request that its route is about, by the rules of this server.

Invariant: it is the only way from bodies to requests, so a rule that holds for one route holds for all.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from starlette.requests import Request

from qengine.serving.body import read_json
from qengine.serving.protocol import CheckedRequest, parse_request
from qengine.serving.service import service_of

_Checked = TypeVar("_Checked", bound=CheckedRequest)


async def read_request(http: Request, kind: type[_Checked]) -> _Checked:
    """The request of `kind` that `http` brings.

    Raises:
        ApiError: 400, 408, 413, 415 or 429, naming what was found and what was expected.
        ClientGoneError: the client left while sending.
    """
    return await read_json(http, partial(parse_request, kind, rules=service_of(http).rules))
