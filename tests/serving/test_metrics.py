"""Metrics of the real engine over HTTP: exact counts, names, labels, and that clients cannot make new series."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qengine.scheduling.records import SchedulerStats
from qengine.serving.metrics.catalog import EngineMetrics, count_bounds
from qengine.serving.metrics.recorder import LOG_SECONDS, ThroughputLog
from qengine.serving.metrics.table import table
from qengine.step_stats import EngineLoad, StepStats
from tests.serving.metric_names import described, render
from tests.serving.quiet import assert_quiet, scrape
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import NAN_PROMPT, ScriptedEngine
from tests.serving.tiny import PROMPT, TEXT, body, small_server, start_engine
from tests.waiting import wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
NAMES_FILE = Path(__file__).with_name("metric_names.txt")

#: What vLLM's own tests (first) and its dashboards and documentation (then) expect of it.
VLLM_TIER_1 = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total"),
    *(
        "generation_tokens_total",
        "request_success_total",
        "iteration_tokens_total_sum",
        "iteration_tokens_total_bucket",
    ),
    *("iteration_tokens_total_count", "request_prompt_tokens_sum", "request_prompt_tokens_bucket"),
    *("request_prompt_tokens_count", "request_generation_tokens_sum", "request_generation_tokens_bucket"),
    *("request_generation_tokens_count", "request_params_n_sum", "request_params_n_bucket", "request_params_n_count"),
    *("request_params_max_tokens_sum", "request_params_max_tokens_bucket", "request_params_max_tokens_count"),
    *("time_to_first_token_seconds_sum", "time_to_first_token_seconds_bucket", "time_to_first_token_seconds_count"),
    *("inter_token_latency_seconds_sum", "inter_token_latency_seconds_bucket", "inter_token_latency_seconds_count"),
    *("e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_count"),
    *("request_queue_time_seconds_sum", "request_queue_time_seconds_bucket", "request_queue_time_seconds_count"),
    *("request_inference_time_seconds_sum", "request_inference_time_seconds_bucket"),
    *("request_inference_time_seconds_count", "request_prefill_time_seconds_sum"),
    *("request_prefill_time_seconds_bucket", "request_prefill_time_seconds_count"),
    *("request_decode_time_seconds_sum", "request_decode_time_seconds_bucket", "request_decode_time_seconds_count"),
)
VLLM_TIER_2 = (
    *("num_requests_waiting_by_reason", "request_time_per_output_token_seconds_bucket"),
    *("request_max_num_generation_tokens_bucket", "request_prefill_kv_computed_tokens_bucket"),
    *("request_num_preemptions_bucket", "prompt_tokens_by_source_total", "prompt_tokens_cached_total"),
    *("prompt_tokens_cached_by_source_total", "engine_healthy", "admission_rejections_total"),
    "corrupted_requests_total",
)


class Counted:
    """Samples by name without the prefix."""

    def __init__(self, server: Running) -> None:
        self._samples = scrape(server)
        self._prefix = server.service.metrics_prefix

    def __getitem__(self, name: str) -> float:
        return self._samples[self._prefix + name]


def test_ten_requests_of_ten_tokens_are_counted_exactly() -> None:
    with small_server(prefix="vllm:") as server:
        prompt_len = server.post(TEXT, body(max_tokens=1)).json()["usage"]["prompt_tokens"]
        before = Counted(server)
        for _ in range(10):
            assert server.post(TEXT, body()).status_code == 200
        after = Counted(server)

    def gained(name: str) -> float:
        return after[name] - before[name]

    assert gained("prompt_tokens_total") == gained("request_prompt_tokens_sum") == 10 * prompt_len
    assert gained("generation_tokens_total") == gained("request_generation_tokens_sum") == 100
    assert gained("iteration_tokens_total_sum") == 10 * (prompt_len + 10)
    assert gained("iteration_tokens_total_count") == 100
    assert gained("time_to_first_token_seconds_count") == 10
    assert gained("inter_token_latency_seconds_count") == 10 * 9
    assert gained('request_success_total{finished_reason="length"}') == 10
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time"):
        assert gained(f"{name}_seconds_count") == 10
    for name in ("request_prefill_time", "request_decode_time", "request_time_per_output_token"):
        assert gained(f"{name}_seconds_count") == 10
    assert gained("request_params_n_sum") == gained("request_params_n_count") == 10
    assert gained("request_params_max_tokens_sum") == gained("request_max_num_generation_tokens_sum") == 100
    cached = gained("prompt_tokens_cached_total")
    assert (
        cached == gained("prefix_cache_hits_total") == gained('prompt_tokens_by_source_total{source="local_cache_hit"}')
    )
    assert gained('prompt_tokens_by_source_total{source="local_compute"}') == 10 * prompt_len - cached
    assert gained("request_prefill_kv_computed_tokens_sum") == 10 * prompt_len - cached
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert after[name] == 0
    phases = sum(gained(f"request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode"))
    assert 0 < phases <= gained("e2e_request_latency_seconds_sum")
    assert gained("time_to_first_token_seconds_sum") <= gained("e2e_request_latency_seconds_sum")
    assert gained("inter_token_latency_seconds_sum") == pytest.approx(gained("request_decode_time_seconds_sum"))


def test_each_choice_is_a_sequence_and_the_request_is_one() -> None:
    with small_server() as server:
        response = server.post(TEXT, body(n=3, temperature=1.0, seed=1, prompt=[PROMPT, "Hello"])).json()
        counted = Counted(server)
    prompt_len = response["usage"]["prompt_tokens"]
    assert response["usage"]["completion_tokens"] == 60
    assert counted['request_success_total{finished_reason="length"}'] == 6
    assert counted["prompt_tokens_total"] == 3 * prompt_len
    assert counted["generation_tokens_total"] == 60
    assert counted["time_to_first_token_seconds_count"] == 6
    assert counted["inter_token_latency_seconds_count"] == 6 * 9
    assert counted["request_params_n_count"] == counted["request_max_num_generation_tokens_count"] == 2
    assert counted["request_params_n_sum"] == 6
    assert counted["request_max_num_generation_tokens_sum"] == 20


def test_preempted_sequences_are_counted_once() -> None:
    """Sixteen sequences that cannot all grow: some give up their blocks and are computed again."""
    block_bytes = start_engine().info
    size = 40 * block_bytes.kv_cache_bytes // block_bytes.num_blocks
    with (
        small_server(kv_cache_memory_bytes=size, max_num_seqs=16, max_model_len=512) as server,
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(lambda i: server.post(TEXT, body(prompt=f"{PROMPT} {i}", max_tokens=120)), range(16)))
        assert all(answer.status_code == 200 for answer in answers)
        counted = Counted(server)
        num_preemptions = server.engine.totals.num_preemptions
    prompt_len = sum(answer.json()["usage"]["prompt_tokens"] for answer in answers)
    assert num_preemptions > 0
    assert counted["num_preemptions_total"] == counted["request_num_preemptions_sum"] == num_preemptions
    assert counted["prompt_tokens_total"] == prompt_len
    assert counted["generation_tokens_total"] == 16 * 120
    assert counted["time_to_first_token_seconds_count"] == 16
    assert counted["inter_token_latency_seconds_count"] == 16 * 119
    assert counted['request_success_total{finished_reason="length"}'] == 16
    assert counted["iteration_tokens_total_sum"] == prompt_len + 16 * 120
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"):
        assert counted[f"{name}_count"] == 16
        assert counted[f"{name}_sum"] > 0


def test_aborted_sequences_are_counted_and_leave_the_gauges_at_zero() -> None:
    with small_server(max_num_seqs=2) as server, assert_quiet(server):
        with server.client() as client:
            for _ in range(3):
                with client.stream("POST", TEXT, json=body(n=3, max_tokens=400, stream=True)) as response:
                    next(response.iter_lines())
        wait_until(lambda: Counted(server)['request_success_total{finished_reason="abort"}'] == 9)
        counted = Counted(server)
        assert counted['request_success_total{finished_reason="length"}'] == 1  # The canary.
        assert counted["e2e_request_latency_seconds_count"] == 1


def test_while_it_waits_and_runs_the_gauges_say_so() -> None:
    engine = ScriptedEngine(max_num_seqs=1)
    with serving(engine) as server, ThreadPoolExecutor(2) as pool:
        engine.hold(listens=True)
        held = [
            pool.submit(server.post, TEXT, {"model": "scripted", "prompt": "hi", "max_tokens": 240}) for _ in range(2)
        ]
        wait_until(lambda: Counted(server)["num_requests_waiting"] == 1)
        counted = Counted(server)
        assert counted["num_requests_running"] == 1
        assert counted['num_requests_waiting_by_reason{reason="capacity"}'] == 1
        assert 0 < counted["kv_cache_usage_perc"] < 1
        engine.allow()
        assert [future.result().status_code for future in held] == [200, 200]
        assert Counted(server)["num_requests_running"] == 0


# Names


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with small_server(prefix="vllm:") as server:
        server.post(TEXT, body(max_tokens=2))
        yield server


def test_the_names_are_those_that_were_agreed(tiny: Running) -> None:
    """Dashboards and rules of others depend on every line of the file; tests/serving/metric_names.py writes it."""
    assert render(described(tiny.get("/metrics").text, "vllm:")) == NAMES_FILE.read_text(encoding="utf-8")


def test_the_document_lists_what_the_code_has() -> None:
    """`python -m qengine.serving.metrics.table` prints the table."""
    assert table() in DOCUMENT.read_text(encoding="utf-8")


def test_the_table_lists_what_a_server_shows(tiny: Running) -> None:
    shown = {name for name, _, _ in described(tiny.get("/metrics").text, "vllm:")}
    of_libraries = {name for name in shown if name.startswith(("process_", "python_"))}
    listed = {line.split("`")[1].removesuffix("_total") for line in table().splitlines()[2:]}
    # The parser takes "_total" off every name, that of a histogram too.
    assert {name.removeprefix("PREFIX").removesuffix("_total") for name in shown - of_libraries} == listed


@pytest.mark.parametrize("name", [*VLLM_TIER_1, *VLLM_TIER_2])
def test_vllms_names_are_there(tiny: Running, name: str) -> None:
    samples = [line for line in tiny.get("/metrics").text.splitlines() if line.startswith((f"vllm:{name}{{",))]
    if name == "admission_rejections_total":
        assert "vllm:admission_rejections_total " in tiny.get("/metrics").text
    elif name == "cache_config_info":
        for label in ("num_gpu_blocks", "block_size", "cache_dtype", "gpu_memory_utilization", "kv_offloading_size"):
            assert f'{label}="' in samples[0]
    else:
        assert samples
        assert all('model_name="tiny"' in line and 'engine="0"' in line for line in samples)


def test_bounds_that_dashboards_name_literally(tiny: Running) -> None:
    text = tiny.get("/metrics").text
    for name, bound in (("time_to_first_token_seconds", "1.0"), ("request_time_per_output_token_seconds", "0.1")):
        assert any(f"vllm:{name}_bucket{{" in line and f'le="{bound}"' in line for line in text.splitlines())


def test_token_counts_have_bounds_up_to_the_context() -> None:
    assert count_bounds(1) == (1,)
    assert count_bounds(8192) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def test_open_metrics_is_served_to_who_asks(tiny: Running) -> None:
    response = tiny.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
    assert tiny.get("/metrics").headers["content-type"].startswith("text/plain; version=")


# The server's own


def test_the_state_is_shown_before_there_is_an_engine() -> None:
    with serving(None) as server:
        samples = scrape(server)
        assert samples['qengine:engine_state{state="loading"}'] == 1
        assert samples['qengine:engine_state{state="ready"}'] == 0
        assert "qengine:num_requests_running" not in samples
        assert samples["process_resident_memory_bytes"] > 0
    with serving(ScriptedEngine()) as server:
        assert scrape(server)['qengine:engine_state{state="ready"}'] == 1
        server.service.begin_drain()
        samples = scrape(server)
        assert samples['qengine:engine_state{state="draining"}'] == 1
        assert samples["qengine:engine_healthy"] == 1


def test_refusals_are_counted_by_reason() -> None:
    with serving(ScriptedEngine(), api_keys=("some-key",), metrics_no_auth=True) as server:
        assert server.get("/v1/models").status_code == 401
        server.service.begin_drain()
        headers = {"x-api-key": "some-key"}
        assert server.post(TEXT, {"model": "scripted", "prompt": "hi"}, headers=headers).status_code == 503
        samples = scrape(server)
    assert samples["qengine:auth_failures_total"] == 1
    assert samples['qengine:rejections_total{reason="draining"}'] == samples["qengine:admission_rejections_total"] == 1
    assert samples['http_requests_total{handler="none",method="GET",status="4xx"}'] == 1
    assert samples['http_requests_total{handler="/v1/completions",method="POST",status="5xx"}'] == 1


def test_the_key_is_needed_unless_the_owner_says_so() -> None:
    with serving(ScriptedEngine(), api_keys=("some-key",)) as server:
        assert server.get("/metrics").status_code == 401
        assert server.get("/metrics", headers={"x-api-key": "some-key"}).status_code == 200
    with serving(ScriptedEngine(), api_keys=("some-key",), metrics_no_auth=True) as server:
        assert server.get("/metrics").status_code == 200
        assert server.get("/v1/models").status_code == 401


def test_clients_cannot_make_new_series() -> None:
    with serving(ScriptedEngine()) as server:
        server.get("/v1/models/scripted")
        server.get("/nothing")
        server.post(TEXT, {"model": "scripted", "prompt": "hi"})
        server.post(TEXT, {"model": "scripted", "prompt": NAN_PROMPT})
        with server.client() as client:
            client.request("BREW", "/nothing")
        series = set(scrape(server))
        with server.client() as client:
            for index in range(20):
                client.get(f"/nothing/{index}?x={index}", headers={"user-agent": f"agent {index}"})
                client.get(f"/v1/models/other-{index}")
                client.request(f"BREW{index}", "/nothing")
                client.post(TEXT, json={"model": "scripted", "prompt": f"hi {index}", "user": f"user {index}"})
        assert {name for name in scrape(server) if name not in series} <= {
            'http_requests_total{handler="/v1/models/{name:path}",method="GET",status="4xx"}'
        }


def test_bytes_and_durations_are_counted_per_route() -> None:
    with serving(ScriptedEngine()) as server:
        sent = server.post(TEXT, {"model": "scripted", "prompt": "hi"})
        streamed = server.post(TEXT, {"model": "scripted", "prompt": "hi", "stream": True})
        server.get("/health")
        samples = scrape(server)
    of_route = f'{{handler="{TEXT}"}}'
    assert samples[f"http_request_size_bytes_count{of_route}"] == 2
    assert samples[f"http_request_size_bytes_sum{of_route}"] == sum(len(r.request.content) for r in (sent, streamed))
    assert samples[f"http_response_size_bytes_sum{of_route}"] == len(sent.content) + len(streamed.content)
    assert samples["http_request_duration_highr_seconds_count"] == 2
    assert samples[f'http_request_duration_seconds_count{{handler="{TEXT}",method="POST"}}'] == 2
    assert not any("/health" in name for name in samples)


# The line in the log


def step(began: float, ended: float, num_prompt_tokens: int, num_generated_tokens: int) -> StepStats:
    return StepStats(
        began, began, ended, ended, num_prompt_tokens=num_prompt_tokens, num_generated_tokens=num_generated_tokens
    )


def test_a_line_every_ten_seconds_of_work(caplog: pytest.LogCaptureFixture) -> None:
    load, totals = EngineLoad(3, 2, 0, 50, 0), SchedulerStats(prefix_cache_queries=200, prefix_cache_hits=50)
    log = ThroughputLog()
    with caplog.at_level(logging.INFO, logger="qengine"):
        for start in range(int(LOG_SECONDS) - 1):
            log.count(step(start, start + 1, 10, 5))
            log.write_when_due(load, 0.5, totals)
        assert not caplog.messages
        log.count(step(LOG_SECONDS - 1, LOG_SECONDS, 10, 5))
        log.write_when_due(load, 0.5, totals)
    assert caplog.messages == [
        "Engine 000: Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 5.0 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 50.0%, Prefix cache hit rate: 25.0%"
    ]


def test_a_pause_says_nothing_and_is_no_part_of_an_average(caplog: pytest.LogCaptureFixture) -> None:
    load, totals, log = EngineLoad(0, 0, 0, 100, 0), SchedulerStats(), ThroughputLog()
    with caplog.at_level(logging.INFO, logger="qengine"):
        log.count(step(0, 1, 10, 5))
        log.write_when_due(load, 0.0, totals)
        for start in (1000.0, 1005.0):
            log.count(step(start, start + 5, 0, 50))
            log.write_when_due(load, 0.0, totals)
    [line] = caplog.messages
    assert "Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 10.0 tokens/s" in line


def test_a_histogram_counts_equal_values_at_once_and_a_bound_belongs_to_its_bucket() -> None:
    one, many = (EngineMetrics("", "m", 100).ttft for _ in range(2))
    for _ in range(3):
        one.observe(0.005)
    many.observe(0.005, count=3)
    one.observe(1e9)
    many.observe(1e9)
    families = [histogram.family("", {}) for histogram in (one, many)]
    assert families[0].samples == families[1].samples
    values = {sample.labels.get("le"): sample.value for sample in families[0].samples}
    assert (values["0.001"], values["0.005"], values["2560.0"], values["+Inf"]) == (0, 3, 3, 4)
