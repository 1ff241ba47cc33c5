"""What every route needs to know of the server: its state, its engine once there is one, its names for the model.

    loading -> ready -> draining -> stopped        any -> dead

Invariant: routes that generate run only in "ready". One Service per server; the owner (server) moves it from state to
state, routes only read it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from qengine.serving.admission import Allowance
from qengine.serving.async_engine import AsyncEngine
from qengine.serving.errors import ApiError, shorten, unavailable
from qengine.serving.limits import LIMITS
from qengine.serving.metrics.exposition import DEFAULT_PREFIX, Monitoring
from qengine.serving.protocol import DEFAULT_RULES, Rules


class Phase(str, Enum):
    """The server's state, as /health shows it."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


_MESSAGES = {
    Phase.LOADING: "the model is still loading",
    Phase.DRAINING: "the server is shutting down and takes no new requests",
    Phase.STOPPED: "the server has stopped",
    Phase.DEAD: "the engine has stopped after an internal failure; restart the server",
}
_LOADING_RETRY_SECONDS = 5


@dataclass(slots=True)
class Service:
    """The state of one server.

    Attributes:
        model_names: what clients may call the model, known once it is ready; answers carry the first.
        rules: what clients may ask.
        bodies: the bytes of all bodies that are being read.
        calls: those whose body has been read and whose answer has not been sent, to its end.
    """

    max_logprobs: int = 20
    metrics_prefix: str = DEFAULT_PREFIX
    model_names: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    engine: AsyncEngine | None = None
    monitoring: Monitoring = field(init=False)
    rules: Rules = DEFAULT_RULES
    bodies: Allowance = field(default_factory=lambda: Allowance(LIMITS.bodies_bytes, "bytes of requests"))
    calls: Allowance = field(default_factory=lambda: Allowance(0, "calls"))
    _phase: Phase = Phase.LOADING

    def __post_init__(self) -> None:
        self.monitoring = Monitoring(self.metrics_prefix, phase=lambda: self.phase.value)

    @property
    def phase(self) -> Phase:
        if self.engine is not None and self.engine.is_dead and self._phase is not Phase.STOPPED:
            return Phase.DEAD
        return self._phase

    def become_ready(self, engine: AsyncEngine, model_names: tuple[str, ...] = ()) -> None:
        """Answer requests from now on, under `model_names` or else the name the engine gives."""
        self.engine = engine
        self.model_names = model_names or (engine.info.model,)
        self._phase = Phase.READY

    def begin_drain(self) -> None:
        """Refuse new requests; those in flight go on."""
        if self.engine is not None:
            self.engine.admission.begin_drain()
        self._phase = Phase.DRAINING

    def stop(self) -> None:
        self._phase = Phase.STOPPED

    def unavailable(self) -> ApiError | None:
        """Why the server cannot answer now, if it cannot."""
        phase = self.phase
        if phase is Phase.READY:
            return None
        retry_after = _LOADING_RETRY_SECONDS if phase is Phase.LOADING else 1
        return unavailable(_MESSAGES[phase], phase.value, retry_after=retry_after)

    def health_problem(self) -> ApiError | None:
        """The same, or that the engine makes no progress: then answers may come or not, and others should be asked."""
        problem = self.unavailable()
        if problem is None and self.engine is not None and self.engine.is_stuck:
            return unavailable("the engine hangs in a step that should have ended long ago", "stuck")
        return problem

    def is_healthy(self) -> bool:
        """Whether the engine makes progress; also while draining."""
        return self.engine is not None and not self.engine.is_dead and not self.engine.is_stuck

    def ready_engine(self) -> AsyncEngine:
        """The engine. Raises ApiError (503) unless the server is ready."""
        problem = self.unavailable()
        if problem is not None:
            raise problem
        assert self.engine is not None
        return self.engine

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) unless `name` is one of ours."""
        if name not in self.model_names:
            raise ApiError(
                404,
                f"the model {shorten(name)} does not exist here; this server has: {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )


class CallLayer:
    """Gives each request a share of `Service.calls`, for `begin_call` to take, until its answer is sent."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._calls = service.calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._calls.reserve() as share:
            scope.setdefault("state", {})["call"] = share
            await self._app(scope, receive, send)


def begin_call(request: Request) -> None:
    """Have a stop of the server wait for the answer to `request`: nothing more is needed of its client."""
    request.state.call.grow(1, must_fit=False)


def service_of(request: Request) -> Service:
    """The Service of the application that `request` came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
