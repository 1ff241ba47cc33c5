"""Decode steps that are recorded once and replayed: on a GPU as CUDA graphs, which launch a step's kernels at one go.

A graph exists per bucket of batch sizes, recorded when the bucket is first met, over fixed inputs (`StaticInputs`); a
smaller batch is filled up with rows that store nothing. Graphs share one memory pool, since only one runs at a time.
Invariant: a replayed step computes what the eager one computes. Prompt chunks and other steps are none of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from qengine.models.decoder import Decoder
from qengine.runtime.device_inputs import DeviceSteps, StaticInputs
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.model_bytes import buckets
from qengine.scheduling.batch import BatchEntry

logger = logging.getLogger(__name__)


class Recording(Protocol):
    """Work that can be repeated. `output` is where each repetition leaves its result."""

    output: torch.Tensor

    def replay(self) -> None:
        """Do it again, on what the inputs hold now."""
        ...


class Recorder(Protocol):
    """Makes recordings on one device."""

    def record(self, work: Callable[[], torch.Tensor]) -> Recording:
        """Run the work once to warm up, then record it."""
        ...


class CudaRecording:
    """A captured CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Captures CUDA graphs into one shared pool, all on one stream: cuBLAS keeps memory for each that it sees."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, work: Callable[[], torch.Tensor]) -> CudaRecording:
        # Compiling kernels and setting up cuBLAS is not allowed while capturing.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = work()
        return CudaRecording(graph, output)


class DecodeGraphs:
    """The recorded decode steps of one model."""

    def __init__(
        self, model: Decoder, cache: KVCache, steps: DeviceSteps, recorder: Recorder, max_num_seqs: int, max_blocks: int
    ) -> None:
        """`max_blocks`: of one sequence."""
        self._model = model
        self._cache = cache
        self._steps = steps
        self._recorder = recorder
        self._max_blocks = max_blocks
        self._buckets = buckets(max_num_seqs)
        self._recorded: dict[int, tuple[StaticInputs, Recording] | None] = {}

    @property
    def num_recorded(self) -> int:
        """Buckets that have been recorded."""
        return sum(recorded is not None for recorded in self._recorded.values())

    def try_run(self, entries: Sequence[BatchEntry]) -> torch.Tensor | None:
        """Hidden states [len(entries), hidden] of a step with one token per sequence; None if it has no graph.

        They stay until the next step.
        """
        if any(e.num_tokens != 1 or e.sample is None or e.prompt_targets for e in entries):
            return None
        bucket = next((b for b in self._buckets if b >= len(entries)), None)
        if bucket is None:
            return None
        if bucket not in self._recorded:
            self._recorded[bucket] = self._try_record(bucket, entries)
        recorded = self._recorded[bucket]
        if recorded is None:
            return None
        static, recording = recorded
        static.load(entries)
        recording.replay()
        return recording.output[: len(entries)]

    def foresee(self, entries: Sequence[BatchEntry]) -> None:
        """Prepare the step after this one, which has been queued; costs the device no time."""
        self._steps.foresee(entries)

    def _try_record(self, bucket: int, entries: Sequence[BatchEntry]) -> tuple[StaticInputs, Recording] | None:
        """A bucket's recording; None if the device refuses it, which costs speed and nothing else."""
        try:
            return self._record(bucket, entries)
        except RuntimeError as error:
            logger.warning("steps of up to %d sequences run without a CUDA graph: %s", bucket, error)
            return None

    def _record(self, bucket: int, entries: Sequence[BatchEntry]) -> tuple[StaticInputs, Recording]:
        """Record a bucket on a real step: what it stores is stored again, the same, when the step is replayed."""
        static = StaticInputs(self._steps, bucket, self._max_blocks)
        static.load(entries)
        layers = self._cache.layers
        recording = self._recorder.record(lambda: self._model.forward(static.token_ids, layers, static.inputs))
        logger.debug("recorded decode steps of up to %d sequences", bucket)
        return static, recording
