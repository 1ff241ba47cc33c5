"""What the user asked for (EngineConfig) and what a model is (ModelConfig), as frozen values.

Option names and defaults are vLLM's where vLLM has the option. Invariant: a config that exists is valid in itself;
what depends on the model or the machine is decided later and returned, never written back here.
Imports neither torch nor triton, so the command line can use it at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from qengine.errors import ConfigError

logger = logging.getLogger(__name__)

AUTO: Literal["auto"] = "auto"
DTYPES = {"auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
DTYPES["float"] = "float32"
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "int8", "fp8", "fp8_e4m3", "fp8_e5m2")
QUANTIZATIONS = {
    **{name: name for name in ("awq", "gptq", "compressed-tensors", "gguf")},
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
}
LOAD_FORMATS = ("auto", "dummy")
P2P_MODES = ("auto", "on", "off")
DEVICES = ("auto", "cpu", "cuda")
_MOST_MEMORY_BYTES = 2**50
#: One machine has no more cards.
MAX_RANKS = 64
_COUNT_SUFFIXES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}


def parse_count(text: str | int, name: str = "value") -> int:
    """A whole number with an optional suffix: k/m/g = powers of 1000, K/M/G = powers of 1024. "1.5k" is 1500.

    Raises:
        ConfigError: if it is no such number.
    """
    match = re.fullmatch(r"\s*([+-]?\d{1,24}(?:\.\d{1,9})?)\s*([kmgKMG]?)\s*", str(text))
    if match is None:
        raise ConfigError(f"{name} is '{text}', expected a whole number such as 4096, 8k (8000) or 8K (8192)")
    value = Decimal(match[1]) * _COUNT_SUFFIXES[match[2]]
    if value != value.to_integral_value():
        raise ConfigError(f"{name} is '{text}', which is not a whole number")
    return int(value)


def parse_memory(text: str | int | float, name: str = "value") -> int:
    """A memory size in bytes: 24GB, 24GiB, 24G and a bare 24 all mean 24 * 2**30 (a 24 GB card has 24 GiB).

    Smaller units are M/MB/MiB and K/KB/KiB; "B" is bytes; a bare number of 2**20 or more is bytes.

    Raises:
        ConfigError: if it is no such size, not above zero, or more than any machine has.
    """
    match = re.fullmatch(r"\s*(\d{1,24}(?:\.\d{1,24})?)\s*(?:([kmgt])(?:i?b)?|(b))?\s*", str(text), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{name} is '{text}', expected a memory size such as 24GiB, 512MiB or 24 (GiB)")
    number = float(match[1])
    if match[3] or (match[2] is None and number >= 2**20):
        factor = 1
    else:
        factor = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}[(match[2] or "g").lower()]
    num_bytes = int(number * factor)
    if num_bytes < 1:
        raise ConfigError(f"{name} is '{text}', expected more than zero")
    if num_bytes > _MOST_MEMORY_BYTES:
        raise ConfigError(f"{name} is '{text}', expected at most {_MOST_MEMORY_BYTES >> 40} TiB")
    return num_bytes


def parse_limits(value: object, name: str = "value") -> int | tuple[int, ...] | None:
    """One memory size for every card, or several, one per card: "22" or "22,23.5". None stays None.

    Raises:
        ConfigError: if one of them is no size.
    """
    if value is None:
        return None
    parts: Sequence[Any] = [value]
    if isinstance(value, str):
        parts = value.split(",")
    elif isinstance(value, list | tuple):
        parts = value
    sizes = tuple(parse_memory(part, name) for part in parts)
    return sizes[0] if len(sizes) == 1 else sizes


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint such as "; did you mean 'dtype'?" or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is '{value}', expected one of: {', '.join(map(str, allowed))}")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}, expected a whole number of at least 1")


#: What means the bundled model where a MODEL cannot be left out.
DEMO = "demo"


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Which model, and how it is read. `model` None is the bundled one.

    `bits` and `group_size` say how dummy weights are quantized; a file's own are never overridden.
    """

    model: str | None = None
    tokenizer: str | None = None
    quantization: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    bits: int | None = None
    group_size: int | None = None
    skip_check: bool = False
    verify: bool = False
    device: str = "auto"
    chat_template: str | None = None
    generation_config: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.quantization is not None:
            _one_of("quantization", self.quantization, tuple(QUANTIZATIONS))
            object.__setattr__(self, "quantization", QUANTIZATIONS[self.quantization])
        _one_of("dtype", self.dtype, tuple(DTYPES))
        object.__setattr__(self, "dtype", DTYPES[self.dtype])
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("skip_check", self.skip_check, (True, False))
        _one_of("verify", self.verify, (True, False))
        if self.verify and self.load_format == "dummy":
            raise ConfigError("verify compares files with their digests, and load_format dummy reads no weights")
        self._check_dummy_scheme()
        _one_of("device", self.device, DEVICES)
        for name in ("model", "tokenizer", "chat_template"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | os.PathLike):
                raise ConfigError(f"{name} is {value!r}, expected text")
            object.__setattr__(self, name, None if value is None else os.fspath(value))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}, expected an integer from 0 to 2**63 - 1")

    def _check_dummy_scheme(self) -> None:
        for name, value in (("bits", self.bits), ("group_size", self.group_size)):
            if value is None:
                continue
            if self.load_format != "dummy":
                raise ConfigError(f"{name} is for load_format dummy alone: a file says its own; leave it out")
            if name == "group_size" and value == -1:
                continue
            _positive(name, value)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache. Sizes are bytes; `gpu_memory_limit` and `gpu_memory_utilization` concern GPUs only.

    `gpu_memory_limit` is one size for every card, or one per card.
    """

    block_size: int = 16
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.92
    gpu_memory_limit: int | tuple[int, ...] | None = None
    kv_cache_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _positive("block_size", self.block_size)
        if self.block_size & (self.block_size - 1) or self.block_size > 256:
            raise ConfigError(f"block_size is {self.block_size}, expected a power of two up to 256, such as 16")
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.block_size == 1 and self.kv_cache_dtype.startswith(("int8", "fp8")):
            raise ConfigError(f"block_size is 1, but a KV cache of {self.kv_cache_dtype} pairs tokens; use 2 or more")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not math.isfinite(share) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share}, expected a fraction above 0 and at most 1")
        _one_of("enable_prefix_caching", self.enable_prefix_caching, (True, False))
        object.__setattr__(self, "gpu_memory_limit", parse_limits(self.gpu_memory_limit, "gpu_memory_limit"))
        size: object = self.kv_cache_memory_bytes
        if isinstance(size, str):
            object.__setattr__(self, "kv_cache_memory_bytes", parse_memory(size, "kv_cache_memory_bytes"))
        elif size is not None:
            _positive("kv_cache_memory_bytes", size)

    def memory_limit(self, rank: int) -> int | None:
        """What a rank may take of its card in all; None where a share says."""
        limit = self.gpu_memory_limit
        return limit[rank] if isinstance(limit, tuple) else limit

    def check_num_limits(self, num_ranks: int) -> None:
        """Several limits are one per rank.

        Raises:
            ConfigError: if there are more or fewer.
        """
        if isinstance(self.gpu_memory_limit, tuple) and len(self.gpu_memory_limit) != num_ranks:
            raise ConfigError(
                f"gpu_memory_limit has {len(self.gpu_memory_limit)} sizes for {num_ranks} card(s); "
                "give one for all of them, or one for each"
            )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of one sequence. `max_model_len` None is the model's own, "auto" the largest that fits."""

    max_model_len: int | str | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if value is None or (name == "max_model_len" and value == AUTO):
                continue
            count = parse_count(value, name) if isinstance(value, str) else value
            _positive(name, count)
            object.__setattr__(self, name, count)


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How many devices share the model, and how they work together.

    Attributes:
        step_timeout: seconds after which a step of several counts as hung.
        p2p: whether cards copy to each other: "auto" checks whether they can.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    step_timeout: float = 60.0
    p2p: str = AUTO

    def __post_init__(self) -> None:
        _one_of("p2p", self.p2p, P2P_MODES)
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            _positive(name, getattr(self, name))
        if self.world_size > MAX_RANKS:
            raise ConfigError(
                f"tensor_parallel_size {self.tensor_parallel_size} times pipeline_parallel_size "
                f"{self.pipeline_parallel_size} is {self.world_size} processes, expected at most {MAX_RANKS}"
            )
        seconds = self.step_timeout
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < float("inf"):
            raise ConfigError(f"step_timeout is {seconds}, expected seconds above 0")

    @property
    def world_size(self) -> int:
        """Ranks, each a process with a device of its own; numbered stage by stage."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def stage_ranks(self, stage: int) -> range:
        """The ranks that share the layers of a stage."""
        size = self.tensor_parallel_size
        return range(stage * size, (stage + 1) * size)

    def pipe_ranks(self, place: int) -> range:
        """The ranks with one place in each stage, which hand activations on."""
        return range(place, self.world_size, self.tensor_parallel_size)

    @property
    def answering_rank(self) -> int:
        """The rank that draws the tokens: the first one of the last stage."""
        return self.world_size - self.tensor_parallel_size


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is started with."""

    load: LoadConfig = field(default_factory=LoadConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    enforce_eager: bool = False

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> EngineConfig:
        """Build from flat option names, those of `LLM` and of the command line with underscores.

        Raises:
            ConfigError: for an unknown name (with the nearest valid one) or a bad value.
        """
        sections: dict[str, dict[str, Any]] = {"": {}}
        for name, value in options.items():
            if name == "trust_remote_code":
                if value:
                    logger.warning("trust_remote_code has no effect: code from a checkpoint is never run")
                continue
            home = _OPTION_HOMES.get(name)
            if home is None:
                raise ConfigError(f"unknown option '{name}'{nearest(name, list(_OPTION_HOMES))}")
            sections.setdefault(home, {})[name] = value
        return EngineConfig(
            load=LoadConfig(**sections.get("load", {})),
            cache=CacheConfig(**sections.get("cache", {})),
            scheduler=SchedulerConfig(**sections.get("scheduler", {})),
            parallel=ParallelConfig(**sections.get("parallel", {})),
            **sections[""],
        )


def _option_homes() -> dict[str, str]:
    homes = {"enforce_eager": ""}
    parts: dict[str, Any] = {
        "load": LoadConfig,
        "cache": CacheConfig,
        "scheduler": SchedulerConfig,
        "parallel": ParallelConfig,
    }
    for section, part in parts.items():
        homes.update({f.name: section for f in dataclasses.fields(part)})
    return homes


_OPTION_HOMES = _option_homes()


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factors` divide the inverse frequencies one by one (GGUF's form of llama3 scaling)."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "factors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """An architecture's sizes and switches, checked, whatever file they came from."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    # Window of each layer in tokens; None attends to everything.
    windows: tuple[int | None, ...] = ()
    torch_dtype: str | None = None
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to the KV cache over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
