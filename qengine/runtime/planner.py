"""MemoryPlan: where the bytes go, decided before any of them is allocated.

From the model's sizes and the machine's free memory alone. Invariant: a sequence of exactly `max_model_len` tokens fits
the planned pool, and the plan never exceeds what it was given. It imports neither torch nor converters and reads
no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qengine.config import AUTO, EngineConfig, ModelConfig
from qengine.errors import ConfigError

logger = logging.getLogger(__name__)

#: On a CPU the cache holds this many sequences of full length by default, but at most this share of free memory.
CPU_SEQUENCES = 4
CPU_SHARE = 0.25
#: One step's tokens by default: small on a CPU, so that a long prompt does not stall the others.
CPU_BATCHED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes an engine is built with. Bytes are exact for the cache; `num_blocks` of `block_size` tokens."""

    max_model_len: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


def common_plan(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """What every one of several ranks can hold, from what each could; bytes per token are those of all together."""
    num_blocks = min(plan.num_blocks for plan in plans)
    return replace(
        plans[0],
        num_blocks=num_blocks,
        max_model_len=min(num_blocks * plans[0].block_size, *(plan.max_model_len for plan in plans)),
        kv_bytes_per_token=sum(plan.kv_bytes_per_token for plan in plans),
    )


def available_memory() -> int:
    """Bytes that can be allocated without swapping: MemAvailable, within the cgroup's limit where there is one."""
    available = _meminfo("MemAvailable")
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return max(0, min(available, int(limit.read()) - int(used.read()) + _cached_files()))
    except (OSError, ValueError):
        return available


def _cached_files() -> int:
    """Bytes of files that the cgroup counts as used, but gives up when memory is asked for."""
    with open("/sys/fs/cgroup/memory.stat") as table:
        return sum(int(line.split()[1]) for line in table if line.startswith("inactive_file "))


def _meminfo(key: str) -> int:
    with open("/proc/meminfo") as table:
        for line in table:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/meminfo has no {key}; set kv_cache_memory_bytes")


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    *,
    kv_bytes_per_token: int,
    free_bytes: int,
    on_gpu: bool = False,
    batched_tokens: int = CPU_BATCHED_TOKENS,
) -> MemoryPlan:
    """Fit the KV cache and the context length into memory.

    Args:
        kv_bytes_per_token: what one token takes in the cache, over all layers.
        free_bytes: what the machine could give the cache: on a GPU all that everything else leaves, and it takes it.
        on_gpu: where the cache is.
        batched_tokens: one step's tokens unless the user says.

    Raises:
        ConfigError: if an explicit max_model_len, or a single block, does not fit; names the largest that would.
    """
    cache, limits = config.cache, config.scheduler
    block_bytes = kv_bytes_per_token * cache.block_size
    wanted = wanted_length(model, limits.max_model_len)
    budget = cache.kv_cache_memory_bytes
    if budget is not None:
        if budget > free_bytes:
            raise ConfigError(
                f"kv_cache_memory_bytes is {size_text(budget)}, but only {size_text(free_bytes)} of memory are free; "
                "lower it"
            )
        most_blocks = budget // block_bytes
    elif on_gpu:
        budget = free_bytes
        most_blocks = budget // block_bytes
    else:
        budget = int(free_bytes * CPU_SHARE)
        most_blocks = min(budget // block_bytes, CPU_SEQUENCES * _blocks(wanted, cache.block_size))
    if most_blocks < 1:
        raise ConfigError(
            f"the KV cache may take {size_text(budget)}, but one block of {cache.block_size} tokens needs "
            f"{size_text(block_bytes)}; free some memory or raise kv_cache_memory_bytes"
        )
    fitting = most_blocks * cache.block_size
    length = _fit_length(wanted, fitting, budget, explicit=isinstance(limits.max_model_len, int))
    batched = limits.max_num_batched_tokens or batched_tokens
    return MemoryPlan(length, batched, cache.block_size, most_blocks, kv_bytes_per_token)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def wanted_length(model: ModelConfig, asked: int | str | None) -> int:
    """The context that is asked for; the model's own where nothing is.

    Raises:
        ConfigError: if the model was not made for so much.
    """
    if asked is None or asked == AUTO:
        return model.max_position
    assert isinstance(asked, int), "config checks max_model_len"
    if asked > model.max_position:
        raise ConfigError(
            f"max_model_len is {asked}, but the model was made for at most {model.max_position} positions; "
            f"use {model.max_position} or less"
        )
    return asked


def _fit_length(wanted: int, fitting: int, budget: int, *, explicit: bool) -> int:
    if wanted <= fitting:
        return wanted
    if explicit:
        raise ConfigError(
            f"max_model_len is {wanted}, but the KV cache of {size_text(budget)} holds {fitting} tokens; "
            f"use max_model_len {fitting} or less, or raise kv_cache_memory_bytes"
        )
    logger.warning(
        "max_model_len lowered from the model's %d to %d: what a KV cache of %s holds "
        "(kv_cache_memory_bytes sets its size)",
        wanted,
        fitting,
        size_text(budget),
    )
    return fitting


def size_text(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
