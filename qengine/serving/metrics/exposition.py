"""What /metrics shows: our instruments, the process, the interpreter.

Invariant: one registry per server, nothing global; a scrape shows all instruments of a set as of one moment. Those of
an engine appear when there is one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from qengine import __version__
from qengine.config import CacheConfig
from qengine.engine import EngineInfo
from qengine.serving.metrics.catalog import (
    REJECTIONS,
    EngineMetrics,
    HttpMetrics,
    ServerMetrics,
    build_info,
    cache_config_info,
)

DEFAULT_PREFIX = "qengine:"


class Monitoring:
    """The metrics of one server.

    Args:
        prefix: of every name of ours but those of HTTP.
        phase: tells the server's state, one of PHASES.
    """

    def __init__(self, prefix: str = DEFAULT_PREFIX, phase: Callable[[], str] = lambda: "loading") -> None:
        self.prefix = prefix
        self.server = ServerMetrics(prefix, phase)
        self.http = HttpMetrics()
        self._registry = CollectorRegistry()
        self._registry.register(self.server)
        self._registry.register(self.http)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def add_engine(
        self, info: EngineInfo, model_name: str, cache: CacheConfig, is_healthy: Callable[[], bool]
    ) -> EngineMetrics:
        """The metrics of an engine, which are shown from now on.

        Args:
            model_name: what clients call it.
            cache: as the engine was started with.
            is_healthy: tells whether the engine makes progress, from any thread.
        """
        metrics = EngineMetrics(self.prefix, model_name, info.max_model_len, is_healthy)
        metrics.weight_bytes.set(info.weight_bytes)
        facts = {
            "version": __version__,
            "python": platform.python_version(),
            "architecture": info.architecture,
            "quantization": info.quantization or "none",
            "dtype": info.dtype,
            "device": info.device,
        }
        self._registry.register(metrics)
        self._registry.register(cache_config_info(self.prefix, info, cache))
        self._registry.register(build_info(self.prefix, facts))
        return metrics

    def rejected(self, reason: str) -> None:
        """Count a request that was turned away; `reason` is one of REJECTIONS."""
        label = reason if reason in REJECTIONS else "other"
        with self.server.lock:
            self.server.rejections.inc(1, label)
            self.server.admission_rejections.inc()

    def auth_failed(self) -> None:
        """Count a request without a valid key."""
        with self.server.lock:
            self.server.auth_failures.inc()

    def stalled(self) -> None:
        """Count a connection that was dropped because nobody read from it."""
        with self.server.lock:
            self.server.stream_stalls.inc()

    def late(self, part: str) -> None:
        """Count a connection that was closed because its "head" or "body" did not arrive in time."""
        with self.server.lock:
            self.server.slow_clients.inc(1, part)

    def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that an Accept header asks for, and its content type. Takes milliseconds."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
