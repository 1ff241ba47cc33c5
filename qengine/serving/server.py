"""run_server: from options to a process that serves until it is told to stop.

    main thread    bind -> start HTTP -> load the model -> wait for a signal -> drain -> stop
    HTTP thread    503 "loading" ...................... | 200 .............. | 503 | answers end
    engine thread                                       | steps ............ | last steps

Invariant: the port is taken before the model is read, and answered from then on. In-flight requests are finished, or
after `drain_timeout` or a second signal told that they failed. Errors of the user's making are raised, not printed.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial

from qengine.config import CacheConfig, EngineConfig
from qengine.engine import Engine
from qengine.imports import freeze_live_objects, thaw_objects
from qengine.runtime.start_times import process_age
from qengine.serving.app import make_app
from qengine.serving.async_engine import AsyncEngine, Timeouts
from qengine.serving.banner import Takes, ready_banner
from qengine.serving.http_server import HttpServer
from qengine.serving.limits import LIMITS
from qengine.serving.metrics.recorder import Recorder
from qengine.serving.open_files import make_room
from qengine.serving.options import ServerOptions
from qengine.serving.protocol import Rules
from qengine.serving.service import Phase, Service
from qengine.serving.signals import InterruptedLoadError, StopSignals
from qengine.serving.sockets import base_url, close_listener, open_listener
from qengine.serving.tracing import Tracer

__all__ = ["EXIT_ENGINE_DEAD", "EXIT_INTERRUPTED", "ServerOptions", "make_service", "run_server", "start_serving"]

logger = logging.getLogger(__name__)

EXIT_ENGINE_DEAD = 3
EXIT_INTERRUPTED = 130
#: After the engine's death the server answers 503 for this long, so that clients and probes hear of it.
DEATH_LINGER_SECONDS = 5.0
_DRAIN_POLL_SECONDS = 0.05
_ABORT_SECONDS = 2.0
#: For which a thread may keep the interpreter: a client's first text waits for several turns of it.
_SWITCH_SECONDS = 0.0002

StartEngine = Callable[[EngineConfig], Engine]


def _start_engine(config: EngineConfig) -> Engine:
    return Engine.start(config, show_progress=sys.stderr.isatty(), import_seconds=process_age())


def run_server(config: EngineConfig, options: ServerOptions, *, start_engine: StartEngine = _start_engine) -> int:
    """Serve until SIGTERM or Ctrl-C, which lets requests in flight finish; a second one does not.

    Args:
        start_engine: makes the engine; tests give another one.

    Returns:
        The exit code: 0 after SIGTERM, 130 after Ctrl-C, 3 if the engine died, if only while it was stopped.

    Raises:
        ConfigError: an option is wrong or the address is taken. LoadError: the model cannot be loaded.
    """
    tracer = None if options.otlp_endpoint is None else Tracer(options.otlp_endpoint)
    listener = open_listener(options)
    switch_seconds = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        service = make_service(options)
        room = make_room(LIMITS.num_connections)
        http = HttpServer(make_app(service, options), listener, options, service.monitoring, num_connections=room)
        with StopSignals() as signals:
            try:
                http.start()
                start = partial(start_engine, config)
                serve = partial(start_serving, service=service, options=options, cache=config.cache, tracer=tracer)
                return _load_and_serve(options, service, listener, signals, start, serve)
            except InterruptedLoadError:
                return _exit_code(signals)
            finally:
                service.stop()
                http.stop()
    finally:
        close_listener(listener)
        sys.setswitchinterval(switch_seconds)
        if tracer is not None:
            tracer.shutdown()


def make_service(options: ServerOptions) -> Service:
    """What the routes need to know, before there is an engine."""
    rules = Rules(options.max_prompts_per_request, options.strict, options.enable_prompt_logprobs)
    return Service(options.max_logprobs, options.metrics_prefix, rules=rules)


def _takes(engine: Engine) -> Takes:
    if engine.tokenizer.chat_template is not None:
        return "messages"
    return "text" if engine.tokenizer.reads_text else "ids"


def start_serving(
    engine: Engine,
    service: Service,
    options: ServerOptions,
    cache: CacheConfig,
    on_death: Callable[[], None] | None = None,
    tracer: Tracer | None = None,
) -> AsyncEngine:
    """Give `engine` a thread and its metrics, and have `service` answer requests with it from now on.

    Args:
        cache: as the engine was started with.
        on_death: called once, in the engine's thread, when a step raised.
        tracer: told of every call that generates.
    """
    names = options.served_model_names or (engine.info.model,)
    metrics = service.monitoring.add_engine(engine.info, names[0], cache, service.is_healthy)
    async_engine = AsyncEngine(
        engine,
        max_queue=options.max_queue,
        on_death=on_death,
        recorder=Recorder(metrics, engine.info.num_blocks),
        timeouts=Timeouts(options.queue_timeout, options.request_timeout),
        tracer=tracer,
        model_name=names[0],
    )
    service.become_ready(async_engine, names)
    return async_engine


def _load_and_serve(
    options: ServerOptions,
    service: Service,
    listener: socket.socket,
    signals: StopSignals,
    start: Callable[[], Engine],
    serve: Callable[..., AsyncEngine],
) -> int:
    signals.set_interrupting(True)
    engine = start()
    signals.set_interrupting(False)
    async_engine = serve(engine, on_death=signals.wake)
    try:
        freeze_live_objects()
        url = base_url(listener, options)
        takes = _takes(engine)
        print(ready_banner(engine.info, service.model_names[0], url, options, takes=takes), flush=True)
        while not signals.received and service.phase is not Phase.DEAD:
            signals.wait()
        if service.phase is Phase.DEAD:
            signals.wait(DEATH_LINGER_SECONDS)
            return EXIT_ENGINE_DEAD
        _drain(service, async_engine, signals, options.drain_timeout)
        # It is shut down below: if it is dead before, it died.
        return EXIT_ENGINE_DEAD if async_engine.is_dead else _exit_code(signals)
    finally:
        thaw_objects()
        if not async_engine.is_dead:
            # What is shut down has not died, whoever asks meanwhile.
            service.stop()
        async_engine.shutdown(_ABORT_SECONDS)


def _drain(service: Service, engine: AsyncEngine, signals: StopSignals, timeout: float) -> None:
    """Refuse what is new, wait for what is in flight: until it is done, time is over, or the next signal."""
    service.begin_drain()
    num_signals = len(signals.received)
    deadline = time.monotonic() + timeout
    calls = service.calls
    if calls.num_in_flight:
        print(
            f"Finishing {calls.num_in_flight} request(s), for at most {timeout:g} s; a second signal stops at once",
            file=sys.stderr,
            flush=True,
        )
    while calls.num_in_flight and not engine.is_dead and len(signals.received) == num_signals:
        if time.monotonic() > deadline:
            break
        signals.wait(_DRAIN_POLL_SECONDS)
    if calls.num_in_flight:
        logger.warning("%d request(s) were stopped before they were finished", calls.num_in_flight)


def _exit_code(signals: StopSignals) -> int:
    return EXIT_INTERRUPTED if signal.SIGINT in signals.received else 0
