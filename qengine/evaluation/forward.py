"""A loaded model that is only asked for hidden states: whole windows in, one row for each token that is scored out.

The engine's own forward over its own KV cache, in steps of bounded size: several short windows at once, a long one in
parts. It does not sample, and needs no scheduler.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qengine.config import EngineConfig
from qengine.errors import ConfigError
from qengine.evaluation.windows import Window
from qengine.runtime.executors import UniprocExecutor
from qengine.runtime.loader import OpenedModel
from qengine.runtime.platform import Platform, choose_device, choose_dtype
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.batch import Batch, BatchEntry
from qengine.startup import EngineInfo, start_on

#: Tokens of one step.
_CPU_ROWS, _GPU_ROWS = 512, 2048


@dataclass(frozen=True, slots=True)
class Forward:
    """A model in memory.

    Attributes:
        info: what it runs as.
        max_rows: tokens of one step.
        num_blocks: of the KV cache; each window takes as many as its tokens fill.
    """

    info: EngineInfo
    executor: UniprocExecutor
    max_rows: int
    num_blocks: int

    @classmethod
    def load(cls, config: EngineConfig, opened: OpenedModel, window: int, *, show_progress: bool = False) -> Forward:
        """Load the model, with a KV cache for the windows of one step and no more.

        Raises:
            ConfigError, LoadError: as the engine's start.
        """
        if config.parallel.world_size > 1:
            raise ConfigError("a model is evaluated on one device; leave tensor_parallel_size and the like at 1")
        device = choose_device(config.load.device)
        dtype = choose_dtype(config.load.dtype, device, opened.config.torch_dtype)
        max_rows = _CPU_ROWS if device.type == "cpu" else _GPU_ROWS
        block_size = config.cache.block_size
        num_blocks = max(-(-window // block_size), -(-max_rows // block_size))
        slots = num_blocks * block_size
        own = replace(
            config,
            cache=replace(
                config.cache,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=slots * opened.config.kv_values_per_token * dtype.itemsize,
            ),
            scheduler=replace(
                config.scheduler, max_model_len=window, max_num_batched_tokens=max_rows, max_num_seqs=num_blocks
            ),
            enforce_eager=True,
        )
        platform = Platform.of(device, dtype, enforce_eager=True)
        parts = start_on(platform, own, opened, show_progress=show_progress)
        assert isinstance(parts.executor, UniprocExecutor), "one device"
        return cls(parts.info, parts.executor, max_rows, num_blocks)

    @property
    def _runner(self) -> ModelRunner:
        return self.executor.runner

    def hidden_states(self, windows: Iterable[Window]) -> Iterator[torch.Tensor]:
        """[len(window.targets), hidden] of each window, in order."""
        for group in self._groups(windows):
            yield from self._run(group)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab] of hidden states [rows, hidden]."""
        return self._runner.model.logits(hidden)

    def close(self) -> None:
        """Release the model."""
        self.executor.shutdown()

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.info.block_size)

    def _groups(self, windows: Iterable[Window]) -> Iterator[list[Window]]:
        """Windows that run in one step; one alone may need several."""
        group: list[Window] = []
        for window in windows:
            lengths = [len(member.token_ids) for member in (*group, window)]
            is_full = sum(lengths) > self.max_rows or sum(map(self._blocks, lengths)) > self.num_blocks
            if group and is_full:
                yield group
                group = []
            group.append(window)
        if group:
            yield group

    @torch.inference_mode()
    def _run(self, group: Sequence[Window]) -> Iterator[torch.Tensor]:
        ends = [0, *itertools.accumulate(self._blocks(len(window.token_ids)) for window in group)]
        tables = [tuple(range(start, end)) for start, end in itertools.pairwise(ends)]
        found: list[list[torch.Tensor]] = [[] for _ in group]
        for start in itertools.count(0, self.max_rows):
            entries = [
                BatchEntry(str(index), tuple(tokens), start, tables[index], None)
                for index, window in enumerate(group)
                if (tokens := window.token_ids[start : start + self.max_rows])
            ]
            if not entries:
                break
            step = self._runner.steps.prepare(Batch(tuple(entries)))
            hidden = self._runner.model.forward(step.token_ids, self._runner.cache.layers, step.inputs)
            for entry, row in zip(step.entries, step.first_rows, strict=True):
                index = int(entry.request_id)
                first, end = group[index].num_context, len(group[index].token_ids) - 1
                rows = slice(row + max(0, first - start), row + max(0, min(entry.num_tokens, end - start)))
                found[index].append(hidden[rows])
        return iter([torch.cat(parts) for parts in found])
