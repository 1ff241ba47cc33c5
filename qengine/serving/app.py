"""The web application: its routes and the layers around them.

    request -> keys or loopback guard -> header count -> routes -> errors in OpenAI's shape

Invariant: there is no route that the outer layers do not see, and no answer that is not JSON, an event stream of it, or
a file of the web page. It starts and stops nothing; server does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from qengine import __version__
from qengine.serving import chat, completions, page
from qengine.serving.auth import ApiKeyGate, HeaderCountGate, LoopbackGate
from qengine.serving.body import ClientGoneError
from qengine.serving.errors import install_error_handlers, json_response
from qengine.serving.service import Service, service_of

#: Only logs and tests see it: the client has gone.
CLIENT_GONE_STATUS = 499

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(http: Request) -> Response:
    """200 if requests can be answered now, else 503; "status" says why."""
    service = service_of(http)
    problem = service.unavailable()
    status: dict[str, Any] = {"status": service.phase.value}
    if problem is None:
        return json_response(status)
    return json_response({**status, **problem.body()}, problem.status, problem.headers)


@router.get("/version")
async def version() -> Response:
    """The version of qengine."""
    return json_response({"version": __version__})


@router.get("/v1/models")
async def list_models(http: Request) -> Response:
    """Every name of the model."""
    service = service_of(http)
    service.ready_engine()
    return json_response({"object": "list", "data": [_model(service, name) for name in service.model_names]})


@router.get("/v1/models/{name:path}")
async def get_model(http: Request, name: str) -> Response:
    """One name of the model."""
    service = service_of(http)
    service.ready_engine()
    service.check_model(name)
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    max_model_len = service.ready_engine().info.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qengine",
        "max_model_len": max_model_len,
    }


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


def make_app(service: Service, *, api_keys: Sequence[str] = (), guarded_host: str | None = None) -> ASGIApp:
    """The application.

    Args:
        service: what the routes work on.
        api_keys: if any, every request but /health and the web page's files needs one of them.
        guarded_host: a loopback address that is served without keys; web pages of other sites are kept out.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    for routes in (router, chat.router, completions.router, page.router):
        app.include_router(routes)
    install_error_handlers(app)
    app.add_exception_handler(ClientGoneError, _client_gone)
    gated: ASGIApp = HeaderCountGate(app)
    if api_keys:
        return ApiKeyGate(gated, api_keys)
    if guarded_host is not None:
        return LoopbackGate(gated, guarded_host)
    return gated
