"""ModelSpec: the declaration of an architecture, and how a config.json becomes a checked ModelConfig.

A spec says what differs between the models of the family, in data; the one decoder does the rest. Invariant: every
number that reaches a ModelConfig is finite, positive and consistent, or a ConfigError names the key.
It loads nothing and has no forward().
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qengine.config import ModelConfig, RopeConfig
from qengine.errors import ConfigError

#: Sizes beyond these are hostile or broken files, not models.
MAX_VOCAB = 2**24
MAX_WIDTH = 2**20
MAX_LAYERS = 2**12
MAX_POSITION = 2**26
MAX_NUMBER = 1e30


@dataclass(frozen=True)
class ModelSpec:
    """One architecture.

    Attributes:
        architectures: names in config.json's ``architectures`` that mean this one.
        qkv_bias, o_bias, mlp_bias: True, False, or the config key that says so.
        qk_norm: per-head RMSNorm of queries and keys before rope.
        sliding_window: "never"; "always" (every layer, if the key is set); "by_layer" (Qwen's use_sliding_window,
            layer_types and max_window_layers).
        defaults: what transformers assumes when a key is missing.
    """

    name: str
    architectures: tuple[str, ...]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    sliding_window: Literal["never", "always", "by_layer"] = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)


class _Keys:
    """Typed, bounded access to a config.json object."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.raw = raw
        self.defaults = defaults

    def get(self, key: str) -> Any:
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def count(self, key: str, high: int, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ConfigError(f"config.json: {key} is {value!r}, expected a whole number from 1 to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
            raise ConfigError(f"config.json: {key} is {value!r}, expected a finite number above zero")
        return float(value)

    def flag(self, rule: bool | str) -> bool:
        if isinstance(rule, bool):
            return rule
        value = self.get(rule)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"config.json: {rule} is {value!r}, expected true or false")
        return bool(value)


def read_model_config(raw: Mapping[str, Any], spec: ModelSpec) -> ModelConfig:
    """Check a config.json object and turn it into a ModelConfig.

    Raises:
        ConfigError: for a missing, malformed, contradictory or unsupported value, naming the key.
    """
    keys = _Keys(raw, spec.defaults)
    hidden = keys.count("hidden_size", MAX_WIDTH)
    num_heads = keys.count("num_attention_heads", MAX_WIDTH)
    num_kv_heads = keys.count("num_key_value_heads", MAX_WIDTH, default=num_heads)
    num_layers = keys.count("num_hidden_layers", MAX_LAYERS)
    head_dim = _head_dim(keys, hidden, num_heads)
    if num_kv_heads > num_heads or num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    _check_activation(keys)
    return ModelConfig(
        architecture=spec.name,
        vocab_size=keys.count("vocab_size", MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=keys.count("intermediate_size", MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=min(keys.count("max_position_embeddings", 10**12, default=2048), MAX_POSITION),
        rms_norm_eps=keys.number("rms_norm_eps", default=1e-6),
        rope=_read_rope(keys, head_dim),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        qkv_bias=keys.flag(spec.qkv_bias),
        o_bias=keys.flag(spec.o_bias),
        mlp_bias=keys.flag(spec.mlp_bias),
        qk_norm=spec.qk_norm,
        windows=_read_windows(keys, spec, num_layers),
        torch_dtype=_read_dtype(keys),
        eos_token_ids=read_token_ids(raw.get("eos_token_id")),
    )


def read_token_ids(value: object) -> frozenset[int]:
    """An eos_token_id entry (an id, a list of ids, or null) as a set. Anything else in it is ignored."""
    items = value if isinstance(value, list) else [value]
    return frozenset(i for i in items if isinstance(i, int) and not isinstance(i, bool) and i >= 0)


def _head_dim(keys: _Keys, hidden: int, num_heads: int) -> int:
    if keys.get("head_dim") is None and hidden % num_heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {num_heads}, and no head_dim says"
        )
    head_dim = keys.count("head_dim", MAX_WIDTH, default=hidden // num_heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim is {head_dim}, expected an even number (rope works on pairs)")
    return head_dim


def _check_activation(keys: _Keys) -> None:
    activation = keys.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act '{activation}' is not supported; this decoder computes silu")


def _read_dtype(keys: _Keys) -> str | None:
    name = keys.get("dtype") or keys.get("torch_dtype")
    return name.removeprefix("torch.") if isinstance(name, str) else None


def _read_rope(keys: _Keys, head_dim: int) -> RopeConfig:
    """Rope from rope_parameters (transformers 5) or rope_theta with rope_scaling (older), or GGUF's divisors."""
    scaling = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {scaling!r}, expected an object")
    values = _Keys({**keys.raw, **scaling}, keys.defaults)
    theta = values.number("rope_theta", default=10000.0)
    factors = keys.get("rope_freq_factors")
    if factors is not None:
        return RopeConfig(theta=theta, kind="factors", factors=_read_factors(factors, head_dim))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=values.number("factor"))
    if kind == "llama3":
        return _read_llama3(theta, values)
    raise ConfigError(
        f"config.json: rope scaling '{kind}' is not supported (supported: default, linear, llama3); "
        "remove rope_scaling to run the model at its original length"
    )


def _read_factors(factors: object, head_dim: int) -> tuple[float, ...]:
    values = factors if isinstance(factors, list) else []
    if len(values) != head_dim // 2 or not all(isinstance(v, float) and 0 < v < MAX_NUMBER for v in values):
        raise ConfigError(f"rope_freq_factors must be {head_dim // 2} finite numbers above zero, one for each pair")
    return tuple(values)


def _read_llama3(theta: float, values: _Keys) -> RopeConfig:
    low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
    if high <= low:
        raise ConfigError(f"config.json: high_freq_factor {high:g} is not above low_freq_factor {low:g}")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=values.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=values.count("original_max_position_embeddings", MAX_POSITION),
    )


def _read_windows(keys: _Keys, spec: ModelSpec, num_layers: int) -> tuple[int | None, ...]:
    # An explicit null means no window; only a missing key takes the architecture's default.
    given = keys.raw.get("sliding_window", spec.defaults.get("sliding_window"))
    if spec.sliding_window == "never" or given is None:
        return (None,) * num_layers
    window = keys.count("sliding_window", 10**12)
    if spec.sliding_window == "always":
        return (window,) * num_layers
    if not keys.flag("use_sliding_window"):
        return (None,) * num_layers
    types = keys.get("layer_types")
    if types is not None:
        return _windows_by_type(types, window, num_layers)
    first = keys.get("max_window_layers")
    first = num_layers if not isinstance(first, int) else first
    return tuple(window if i >= first else None for i in range(num_layers))


def _windows_by_type(types: object, window: int, num_layers: int) -> tuple[int | None, ...]:
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers or any(str(t) not in known for t in types):
        raise ConfigError(f"config.json: layer_types must be a list of {num_layers} names out of {sorted(known)}")
    return tuple(known[t] for t in types)
