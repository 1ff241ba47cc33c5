"""What the server is started with, checked.

Invariant: options that exist are valid in themselves and safe: a server that other machines can reach has keys, or its
owner said in so many words that it needs none. It does not import the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qengine.errors import ConfigError
from qengine.serving.exposure import check_endpoint, check_exposure, check_key, check_origin, check_prefix

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how to serve.

    Attributes:
        host, port: the address; port 0 picks a free one.
        uds: path of a unix socket, instead of host and port; only its owner can connect.
        api_keys: clients must send one of them; none means anyone who can connect.
        allow_no_auth: serve beyond this machine without keys.
        served_model_names: what clients call the model; the first is echoed. Empty: the model as given.
        max_logprobs: log-probabilities per token that a request may ask for.
        enable_prompt_logprobs: requests may ask for those of the prompt's tokens.
        max_prompts_per_request: prompts of one completions or embeddings call.
        strict: refuse fields that nobody knows.
        max_queue: sequences that may wait beyond those that run.
        ssl_keyfile, ssl_certfile: serve HTTPS.
        drain_timeout: seconds that requests in flight get when the server is told to stop.
        queue_timeout: seconds that a request may wait to be begun; None for any time.
        request_timeout: seconds that a request may take from its arrival to its end; None for any time.
        max_concurrency_per_key: requests that may be under way with one key; None for any number.
        allowed_origins: web sites whose pages may use the server, such as "https://example.org"; "*" is any.
        metrics_prefix: of the metrics' names; "vllm:" makes dashboards for vLLM work.
        metrics_no_auth: serve /metrics without a key.
        otlp_endpoint: where traces go, such as "http://localhost:4318/v1/traces"; None for nowhere.

    Raises:
        ConfigError: naming the option, what was found and what was expected.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = ()
    allow_no_auth: bool = False
    served_model_names: tuple[str, ...] = ()
    max_logprobs: int = 20
    enable_prompt_logprobs: bool = False
    max_prompts_per_request: int = 256
    strict: bool = False
    max_queue: int = 128
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    drain_timeout: float = 30.0
    queue_timeout: float | None = None
    request_timeout: float | None = None
    max_concurrency_per_key: int | None = None
    allowed_origins: tuple[str, ...] = ()
    metrics_prefix: str = "qengine:"
    metrics_no_auth: bool = False
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("api_keys", "served_model_names", "allowed_origins"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_int("port", self.port, _MAX_PORT)
        _check_int("max_logprobs", self.max_logprobs)
        _check_int("max_queue", self.max_queue)
        _check_int("max_prompts_per_request", self.max_prompts_per_request)
        if not self.max_prompts_per_request:
            raise ConfigError("max_prompts_per_request is 0, which would refuse everyone; give at least 1")
        if not math.isfinite(self.drain_timeout) or self.drain_timeout < 0:
            raise ConfigError(f"drain_timeout is {self.drain_timeout}, expected seconds of at least 0")
        self._check_limits()
        check_prefix(self.metrics_prefix)
        for origin in self.allowed_origins:
            check_origin(origin)
        if self.otlp_endpoint is not None:
            check_endpoint(self.otlp_endpoint)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl-keyfile and --ssl-certfile go together; give both or neither")
        if not all(self.served_model_names):
            raise ConfigError("a served model name is empty; give it at least one character")
        for key in self.api_keys:
            check_key(key, "api_keys")
        if self.uds is None:
            check_exposure(self.host, self.api_keys, self.allow_no_auth)

    def _check_limits(self) -> None:
        for name in ("queue_timeout", "request_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise ConfigError(f"{name} is {seconds}, expected seconds above 0; leave it out for no limit")
        if self.max_concurrency_per_key is None:
            return
        _check_int("max_concurrency_per_key", self.max_concurrency_per_key)
        if not self.max_concurrency_per_key:
            raise ConfigError("max_concurrency_per_key is 0, which would refuse everyone; leave it out for no limit")
        if not self.api_keys:
            raise ConfigError("max_concurrency_per_key needs keys to count by; give --api-key too")


def _check_int(name: str, value: object, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ConfigError(f"{name} is {value!r}, expected a whole number of at least 0{upper}")
