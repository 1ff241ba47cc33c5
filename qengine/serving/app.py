"""The web application: its routes and the layers around them.

    request -> counted -> CORS, if asked for -> keys or loopback guard -> header count -> routes, errors as their API's

Invariant: there is no route that the outer layers do not see, and no answer that is not JSON, an event stream of it, or
a file of the web page. It starts and stops nothing; server does.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from qengine import __version__
from qengine.serving import api_docs, chat, completions, embeddings, messages, page, responses, text_routes
from qengine.serving.api_answers import Health, Model, ModelList, Version
from qengine.serving.api_schema import described
from qengine.serving.auth import OPEN_PATHS, ApiKeyGate, HeaderCountGate, LoopbackGate
from qengine.serving.body import ClientGoneError
from qengine.serving.errors import ApiError, install_error_handlers, json_response
from qengine.serving.exposure import is_loopback
from qengine.serving.metrics.http_metrics import HttpMetricsLayer
from qengine.serving.options import ServerOptions
from qengine.serving.service import CallLayer, Service, service_of

#: Only logs and tests see it: the client has gone.
CLIENT_GONE_STATUS = 499

router = APIRouter()


@router.get("/health", **described(tag="Server", answer=Health))
@router.head("/health", include_in_schema=False)
async def health(http: Request) -> Response:
    """200 if requests can be answered now, else 503; "status" says why."""
    service = service_of(http)
    problem = service.health_problem()
    if problem is None:
        return json_response({"status": service.phase.value})
    return json_response({"status": problem.code, **problem.body()}, problem.status, problem.headers)


@router.get("/metrics", **described(tag="Server", media_type="text/plain"))
@router.head("/metrics", include_in_schema=False)
async def metrics(http: Request) -> Response:
    """Metrics for Prometheus, in any state."""
    monitoring = service_of(http).monitoring
    # In a thread: collecting and formatting takes some milliseconds.
    content, content_type = await asyncio.to_thread(monitoring.text, http.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})


@router.get("/version", **described(tag="Server", answer=Version))
async def version() -> Response:
    """The version of qengine."""
    return json_response({"version": __version__})


@router.get("/v1/models", **described(tag="Model", answer=ModelList))
async def list_models(http: Request) -> Response:
    """Every name of the model."""
    service = service_of(http)
    service.ready_engine()
    return json_response({"object": "list", "data": [_model(service, name) for name in service.model_names]})


@router.get("/v1/models/{name:path}", **described(tag="Model", answer=Model))
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


#: Everything that can be asked for.
ROUTERS = (
    *(router, chat.router, completions.router, responses.router, messages.router, embeddings.router),
    *(text_routes.router, api_docs.router, page.router),
)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


def make_app(service: Service, options: ServerOptions) -> ASGIApp:
    """The application.

    Every request but those to OPEN_PATHS needs a key, if there are any. Without keys a loopback address is guarded
    against web pages of other sites, unless their origin is allowed.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.api = api_docs.ApiDocs(app, needs_key=bool(options.api_keys), open_paths=_open_paths(options))
    for routes in ROUTERS:
        app.include_router(routes)
    install_error_handlers(app, lambda error: _count_rejection(service, error))
    app.add_exception_handler(ClientGoneError, _client_gone)
    gated = _with_cors(_gated(HeaderCountGate(app), service, options), options)
    return HttpMetricsLayer(CallLayer(gated, service), service.monitoring.http)


def _count_rejection(service: Service, error: ApiError) -> None:
    if error.status in (429, 503):
        service.monitoring.rejected(error.code or "")


def _open_paths(options: ServerOptions) -> frozenset[str]:
    return OPEN_PATHS | {"/metrics"} if options.metrics_no_auth else OPEN_PATHS


def _gated(app: ASGIApp, service: Service, options: ServerOptions) -> ASGIApp:
    if options.api_keys:
        return ApiKeyGate(
            app,
            options.api_keys,
            open_paths=_open_paths(options),
            max_concurrency=options.max_concurrency_per_key,
            monitoring=service.monitoring,
        )
    if options.uds is None and is_loopback(options.host):
        return LoopbackGate(app, options.host, options.allowed_origins)
    return app


def _with_cors(app: ASGIApp, options: ServerOptions) -> ASGIApp:
    """Outside of the keys, for a browser asks whether it may send one before it does."""
    if not options.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=options.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )
