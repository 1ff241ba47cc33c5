"""Spans: what is in them and what never is, the caller's trace, a real collector, and a missing package."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from qengine.config import EngineConfig
from qengine.errors import ConfigError
from qengine.request import SamplingParams
from qengine.serving import server as server_module
from qengine.serving.options import ServerOptions
from qengine.serving.tracing import Tracer
from tests.serving.running import serving
from tests.serving.scripted_engine import NAN_PROMPT, ScriptedEngine
from tests.serving.tiny import TEXT, body, start_engine

ENDPOINT = "http://localhost:4318/v1/traces"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """A tracer that keeps its spans."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = Tracer(ENDPOINT, exporter=self._exporter)

    def spans(self) -> Sequence[ReadableSpan]:
        self.tracer.shutdown()
        return self._exporter.get_finished_spans()


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_has_counts_and_times_and_the_callers_trace(stream: bool) -> None:
    traced = Traced()
    engine = start_engine()
    with serving(engine, tracer=traced.tracer, served_model_names=("tiny",)) as server:
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
        sent = body(n=2, max_tokens=5, stream=stream, stream_options={"include_usage": True} if stream else None)
        assert server.post(TEXT, sent, headers=headers).status_code == 200
    [span] = traced.spans()
    assert span.name == "llm_request"
    assert span.kind.name == "SERVER"
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.request.max_tokens"] == 5
    assert attributes["gen_ai.usage.completion_tokens"] == 10
    assert attributes["gen_ai.usage.num_sequences"] == 2
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    times = {name.rpartition(".")[2]: value for name, value in attributes.items() if "latency" in name}
    assert all(value >= 0 for value in times.values())
    assert times["time_in_model_prefill"] + times["time_in_model_decode"] == pytest.approx(
        times["time_in_model_inference"]
    )
    assert times["time_to_first_token"] <= times["e2e"]
    assert span.start_time is not None
    assert span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 >= times["e2e"]
    assert span.status.is_ok or span.status.is_unset


def test_no_text_gets_into_a_span_even_when_it_fails() -> None:
    traced = Traced()
    with serving(ScriptedEngine(), tracer=traced.tracer) as server:
        for prompt in ("my-secret", NAN_PROMPT + " my-secret"):
            server.post(TEXT, {"model": "scripted", "prompt": prompt, "user": "my-secret", "stop": ["my-secret"]})
        server.post(TEXT, {"model": "scripted", "prompt": "my-secret"}, headers={"traceparent": "my-secret"})
    spans = traced.spans()
    assert [span.status.is_ok or span.status.is_unset for span in spans] == [True, False, True]
    for span in spans:
        shown = span.to_json()
        assert "my-secret" not in shown
        assert "sky" not in shown


def test_a_collector_hears_of_it() -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        tracer = Tracer(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        tracer.record("cmpl-1", "m", SamplingParams(), 0.0, [])
        tracer.shutdown()
        collector.shutdown()
    [message] = received
    resource = ExportTraceServiceRequest.FromString(message).resource_spans[0]
    assert [span.name for span in resource.scope_spans[0].spans] == ["llm_request"]
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "qengine"


def test_a_missing_package_is_said_before_the_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    def never(config: EngineConfig) -> Any:
        raise AssertionError("the model was read")

    with pytest.raises(ConfigError, match=r"--otlp-endpoint.*pip install 'qengine\[otel\]'"):
        server_module.run_server(EngineConfig(), ServerOptions(port=0, otlp_endpoint=ENDPOINT), start_engine=never)


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://host/v1/traces", "http://", "http://user@host/"])
def test_an_endpoint_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        ServerOptions(otlp_endpoint=url)
