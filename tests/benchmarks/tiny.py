"""A machine without a GPU in a GPU's place: interpreted kernels, recorded steps that are Python, and tiny models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.device import Machine
from qengine.runtime.platform import Platform
from quant_kernels.linear.dispatch import Target
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TuningTable

CPU = torch.device("cpu")
#: Few multiprocessors: attention is launched with programs for all of them, and each is interpreted.
CARD = replace(KNOWN_CARDS["h100"], num_sms=2)
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    # Sizes that divide into groups of 128 would be slow to interpret.
    "quantization_config": {"quant_method": "gptq", "group_size": 64},
}
TINY = {**SIZES, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}


class Replayed:
    """Stands for a CUDA graph: does the work again, into the same output."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self._work = work
        self.output = work()

    def replay(self) -> None:
        self.output.copy_(self._work())


class PythonRecorder:
    """Stands for `CudaRecorder`."""

    def record(self, work: Callable[[], torch.Tensor]) -> Replayed:
        return Replayed(work)


def machine(dtype: torch.dtype) -> Machine:
    """The CPU with interpreted kernels, as an H100 would be told to run them."""

    def make_platform(enforce_eager: bool) -> Platform:
        target = Target(CPU, dtype, Selector(CARD, TuningTable.empty(CARD)))
        return Platform(target, None if enforce_eager else PythonRecorder())

    return Machine(CPU, make_platform, 1e9, dtype)


class StoppedClock:
    """Stands for TimedGraph: calls everything and always says ten microseconds."""

    def __init__(self, calls: Sequence[Callable[[], torch.Tensor]]) -> None:
        assert calls
        for call in calls:
            assert call().isfinite().all()

    def microseconds(self, replays: int = 1) -> list[float]:
        return [10.0] * replays
