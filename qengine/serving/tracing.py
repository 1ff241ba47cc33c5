"""OpenTelemetry spans, for who asks with --otlp-endpoint: one "llm_request" for every call that generates.

Names of attributes are vLLM's. Invariant: a span holds numbers, the model's name and our own id of the call, never any
text of a prompt, an answer or an error. Spans are sent by a thread of the SDK; a collector that is away costs nothing
but spans. The SDK is imported only when a tracer is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from qengine import __version__
from qengine.imports import import_late
from qengine.request import RequestOutput, SamplingParams

_INSTALL = "pip install 'qengine[otel]'"
_SEND_SECONDS = 5.0


class Tracer:
    """Sends spans to `endpoint`.

    Args:
        endpoint: URL of a collector that takes OTLP over HTTP.
        exporter: where spans go instead; for tests.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, *, exporter: Any = None) -> None:
        def module(name: str) -> Any:
            return import_late(name, needed_for="--otlp-endpoint", install=_INSTALL)

        trace, sdk = module("opentelemetry.trace"), module("opentelemetry.sdk.trace")
        export, resources = module("opentelemetry.sdk.trace.export"), module("opentelemetry.sdk.resources")
        if exporter is None:
            http = module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            exporter = http.OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS)
        resource = resources.Resource.create({"service.name": "qengine", "service.version": __version__})
        self._provider = sdk.TracerProvider(resource=resource)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("qengine", __version__)
        self._server_kind = trace.SpanKind.SERVER
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._propagator = module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()

    def record(
        self,
        call_id: str,
        model: str,
        params: SamplingParams,
        arrival_time: float,
        outputs: Iterable[RequestOutput],
        *,
        traceparent: str | None = None,
        failed: bool = False,
    ) -> None:
        """Send the span of a call that has ended.

        Args:
            arrival_time: of `time.monotonic`.
            outputs: the newest of each of its prompts, whole or not.
            traceparent: the caller's, as its header says it; None begins a trace.
            failed: whether it ended in an error or was given up.
        """
        now = time.monotonic()
        ended = time.time_ns()
        context = self._propagator.extract({"traceparent": traceparent} if traceparent else {})
        span = self._tracer.start_span(
            "llm_request",
            context=context,
            kind=self._server_kind,
            start_time=ended - int(1e9 * (now - arrival_time)),
            attributes={**_request_attributes(call_id, model, params), **_output_attributes(list(outputs))},
        )
        if failed:
            span.set_status(self._error)
        span.end(end_time=ended)

    def shutdown(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.shutdown()


def _request_attributes(call_id: str, model: str, params: SamplingParams) -> Mapping[str, Any]:
    attributes = {
        "gen_ai.request.id": call_id,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
    }
    return attributes if params.max_tokens is None else {**attributes, "gen_ai.request.max_tokens": params.max_tokens}


def _output_attributes(outputs: list[RequestOutput]) -> Mapping[str, Any]:
    choices = [choice for output in outputs for choice in output.outputs]
    attributes: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "gen_ai.usage.completion_tokens": sum(len(choice.token_ids) for choice in choices),
        "gen_ai.usage.num_sequences": len(choices),
        "gen_ai.response.finish_reasons": [choice.finish_reason or "abort" for choice in choices],
    }
    times = [output.times for output in outputs if output.times is not None and output.times.first_token]
    if times and len(times) == len(outputs):
        arrival, queued = times[0].arrival, times[0].queued
        scheduled, first = min(t.scheduled for t in times), min(t.first_token for t in times)
        last = max(t.last_token for t in times)
        attributes |= {
            "gen_ai.latency.time_in_queue": scheduled - queued,
            "gen_ai.latency.time_to_first_token": first - arrival,
            "gen_ai.latency.time_in_model_prefill": first - scheduled,
            "gen_ai.latency.time_in_model_decode": last - first,
            "gen_ai.latency.time_in_model_inference": last - scheduled,
            "gen_ai.latency.e2e": last - arrival,
        }
    return attributes
