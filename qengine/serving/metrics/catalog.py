"""Every metric of our own: its name, its meaning, its labels and its buckets, in one place.

Names, labels and buckets that vLLM has are vLLM's, so that dashboards, autoscaling rules and routers made for it work
with ``--metrics-prefix vllm:``. A "sequence" is one choice of one prompt: vLLM counts these as its requests.
docs/metrics.md is made from here. Nothing in this module measures: recorder and http_metrics do.
"""

from __future__ import annotations

from collections.abc import Callable

from qengine.config import CacheConfig
from qengine.engine import EngineInfo
from qengine.serving.metrics.instruments import Counter, Gauge, Histogram, InstrumentSet, Reading, Summary

#: Dashboards select some of these bounds literally (le="1.0" of the first, le="0.1" of the second).
TTFT_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
ITERATION_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES_BOUNDS = (1, 2, 5, 10, 20)
PREEMPTION_BOUNDS = (0, 1, 2)
STEP_BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0, 30.0, 60.0)

HIGHR_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0),
    60.0,
)
LOWR_BOUNDS = (0.1, 0.5, 1.0)

#: "repetition" is vLLM's and does not happen here; rules that name it find a zero.
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECTIONS = (
    *("queue_full", "queue_timeout", "key_concurrency", "bodies_full", "connections_full"),
    *("draining", "loading", "dead", "stopped", "other"),
)
DEATHS = ("step",)
STEP_PHASES = ("schedule", "execute", "finish")
PHASES = ("loading", "ready", "draining", "stopped", "dead")


def count_bounds(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    bounds: list[int] = []
    decade = 1
    while True:
        for step in (1, 2, 5):
            if step * decade > limit:
                return tuple(bounds)
            bounds.append(step * decade)
        decade *= 10


class EngineMetrics(InstrumentSet):
    """What an engine does. Labels `model_name` and `engine` on every one."""

    def __init__(
        self, prefix: str, model_name: str, max_model_len: int, is_healthy: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(prefix, {"model_name": model_name, "engine": "0"})
        self._add_load()
        self.add(
            Reading(
                "engine_healthy",
                "1 while steps end in time, 0 when one hangs or the engine has stopped.",
                (),
                lambda: {(): float(is_healthy())},
            )
        )
        self._add_counters()
        self._add_request_sizes(count_bounds(max_model_len))
        self._add_request_times()

    def _add_load(self) -> None:
        self.running = self.add(Gauge("num_requests_running", "Sequences that hold KV blocks."))
        self.waiting = self.add(Gauge("num_requests_waiting", "Sequences that wait to be run."))
        self.waiting_by_reason = self.add(
            Gauge(
                "num_requests_waiting_by_reason",
                "The same by what they wait for: capacity, or deferred until a sibling has computed their prompt.",
                ["reason"],
            )
        )
        self.kv_usage = self.add(Gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."))
        self.kv_blocks = self.add(
            Gauge("kv_blocks", "KV blocks: used, cached (free, a prompt can still find them) or free.", ["state"])
        )
        self.weight_bytes = self.add(Gauge("weights_bytes", "Bytes of the model's weights as they are kept."))

    def _add_counters(self) -> None:
        def counter(name: str, help: str) -> Counter:
            return self.add(Counter(name, help))

        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found there.")
        self.preemptions = counter("num_preemptions", "Times that a sequence had to give up its blocks.")
        self.oom_steps = counter(
            "oom_steps", "Steps for which there was no memory; smaller ones were run in their place."
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of sequences that got their first token.")
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Those of them that came from the prefix cache.")
        self.prompt_tokens_by_source = self.add(
            Counter(
                "prompt_tokens_by_source",
                "Prompt tokens by where their keys and values came from.",
                ["source"],
                [("local_compute",), ("local_cache_hit",)],
            )
        )
        self.prompt_tokens_cached_by_source = self.add(
            Counter(
                "prompt_tokens_cached_by_source",
                "Cached prompt tokens by where they were kept.",
                ["source"],
                [("device",)],
            )
        )
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.success = self.add(
            Counter(
                "request_success",
                "Sequences that ended, by reason; abort: their client left.",
                ["finished_reason"],
                [(reason,) for reason in FINISH_REASONS],
            )
        )
        self.corrupted = counter("corrupted_requests", "Sequences that failed because their logits were not finite.")
        self.deaths = self.add(
            Counter(
                "engine_dead",
                "Times that the engine stopped, by what failed.",
                ["reason"],
                [(reason,) for reason in DEATHS],
            )
        )

    def _add_request_sizes(self, bounds: tuple[int, ...]) -> None:
        def histogram(name: str, help: str, its_bounds: tuple[float, ...] = bounds) -> Histogram:
            return self.add(Histogram(name, help, its_bounds))

        self.iteration_tokens = self.add(
            Histogram(
                "iteration_tokens_total",
                "Tokens that a step brought forward: prompts that got their first token, and tokens generated.",
                ITERATION_BOUNDS,
            )
        )
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of an ended sequence.")
        self.request_generation_tokens = histogram("request_generation_tokens", "Generated tokens of it.")
        self.request_computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of it that were computed, not found in the cache."
        )
        self.params_max_tokens = histogram("request_params_max_tokens", "The most it might have generated.")
        self.params_n = histogram("request_params_n", "Choices per prompt of an ended request.", CHOICES_BOUNDS)
        self.max_num_generation_tokens = histogram(
            "request_max_num_generation_tokens", "Generated tokens of an ended request's longest choice."
        )
        self.request_preemptions = histogram(
            "request_num_preemptions", "Times that an ended sequence had to give up its blocks.", PREEMPTION_BOUNDS
        )

    def _add_request_times(self) -> None:
        def histogram(name: str, help: str, bounds: tuple[float, ...] = REQUEST_BOUNDS) -> Histogram:
            return self.add(Histogram(name, help, bounds))

        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_BOUNDS
        )
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", TOKEN_BOUNDS)
        self.per_output_token = histogram(
            "request_time_per_output_token_seconds", "The mean of that over an ended sequence.", TOKEN_BOUNDS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to last token.")
        self.queue_time = histogram("request_queue_time_seconds", "From the queue to the first step.")
        self.inference_time = histogram("request_inference_time_seconds", "From the first step to the last token.")
        self.prefill_time = histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self.decode_time = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.step_time = self.add(
            Histogram(
                "step_time_seconds",
                "A step's phases: schedule, execute (the model and the sampler), finish (text, ends).",
                STEP_BOUNDS,
                ["phase"],
            )
        )
        self.allreduce = self.add(
            Histogram(
                "allreduce_seconds",
                "A step's all-reduces and all-gathers, waits included, on the slowest rank. "
                "CPU ranks alone tell: on GPUs the host does not see it.",
                STEP_BOUNDS,
            )
        )


class ServerMetrics(InstrumentSet):
    """What the server does, with or without an engine."""

    def __init__(self, prefix: str, phase: Callable[[], str] = lambda: PHASES[0]) -> None:
        super().__init__(prefix)
        self.add(
            Reading(
                "engine_state",
                "1 for the state that the server is in, 0 for the others.",
                ("state",),
                lambda: {(name,): float(name == phase()) for name in PHASES},
            )
        )
        self.rejections = self.add(
            Counter(
                "rejections",
                "Requests turned away with status 429 or 503, by reason.",
                ["reason"],
                [(reason,) for reason in REJECTIONS],
            )
        )
        self.admission_rejections = self.add(Counter("admission_rejections", "All of them."))
        self.auth_failures = self.add(Counter("auth_failures", "Requests without a valid API key."))
        self.stream_stalls = self.add(Counter("stream_stalls", "Connections dropped because nobody read from them."))
        self.slow_clients = self.add(
            Counter(
                "slow_clients",
                "Connections closed because a request did not arrive in time.",
                ["part"],
                [("head",), ("body",)],
            )
        )


class HttpMetrics(InstrumentSet):
    """What came over HTTP, under the names of prometheus-fastapi-instrumentator and so without a prefix.

    `handler` is the route's template, "none" where there is no such route. Probes and scrapes are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.add(
            Counter("http_requests", "Requests, by route, method and class of status.", ["handler", "method", "status"])
        )
        self.request_bytes = self.add(
            Summary("http_request_size_bytes", "Bytes of the bodies that were read.", ["handler"])
        )
        self.response_bytes = self.add(
            Summary("http_response_size_bytes", "Bytes of the bodies that were sent.", ["handler"])
        )
        self.duration = self.add(
            Histogram("http_request_duration_highr_seconds", "Until the last byte of an answer.", HIGHR_BOUNDS)
        )
        self.duration_by_handler = self.add(
            Histogram(
                "http_request_duration_seconds", "The same by route, coarsely.", LOWR_BOUNDS, ["handler", "method"]
            )
        )


def cache_config_info(prefix: str, info: EngineInfo, cache: CacheConfig) -> InstrumentSet:
    """The KV cache's configuration as labels, in vLLM's form."""
    facts = {
        "engine": "0",
        "num_gpu_blocks": str(info.num_blocks),
        "block_size": str(info.block_size),
        "cache_dtype": cache.kv_cache_dtype,
        "gpu_memory_utilization": str(cache.gpu_memory_utilization),
        "enable_prefix_caching": str(cache.enable_prefix_caching),
        "prefix_caching_hash_algo": "sha256",
        "num_cpu_blocks": "0",
        "kv_offloading_backend": "none",
        "kv_offloading_size": "0",
    }
    return _info(prefix, "cache_config_info", "1; its labels tell the configuration of the KV cache.", facts)


def build_info(prefix: str, facts: dict[str, str]) -> InstrumentSet:
    """Versions and what runs, as labels."""
    return _info(prefix, "build_info", "1; its labels tell versions, the device and the model's format.", facts)


def _info(prefix: str, name: str, help: str, facts: dict[str, str]) -> InstrumentSet:
    instruments = InstrumentSet(prefix, facts)
    instruments.add(Gauge(name, help)).set(1)
    return instruments
