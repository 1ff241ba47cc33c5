"""Engines on Triton's kernels in place of a GPU: the interpreter where there is none, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qengine import SamplingParams
from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.request import RequestOutput
from qengine.runtime.loader import open_model
from qengine.runtime.platform import Platform
from qengine.startup import start_on
from quant_kernels.linear.dispatch import Target
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TuningTable
from tests.engine.fixtures import path

CPU = torch.device("cpu")
CARD = KNOWN_CARDS["4090"]
TINY: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
#: A made-up 4-bit model and a tokenizer of the same size.
OPTIONS: Mapping[str, Any] = {
    "load_format": "dummy",
    "quantization": "gptq",
    "dtype": "float32",
    "max_model_len": 256,
    "tokenizer": path("llama-gptq-sym-g128"),
}


class ReplayedFunction:
    """A recording that runs its function again, on what the inputs hold by then."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self._work = work
        self.output = work()
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.output.copy_(self._work())


class ReplayingRecorder:
    """Stands in for CUDA graphs."""

    def __init__(self) -> None:
        self.recordings: list[ReplayedFunction] = []

    def record(self, work: Callable[[], torch.Tensor]) -> ReplayedFunction:
        self.recordings.append(ReplayedFunction(work))
        return self.recordings[-1]


def tiny_folder(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**TINY, "quantization_config": {"group_size": 32}, **changes}))
    return str(folder)


def triton_platform(recorder: ReplayingRecorder | None = None) -> Platform:
    selector = Selector(CARD, TuningTable.empty(CARD))
    return Platform(Target(CPU, torch.float32, selector), recorder)


def start(platform: Platform | None, **options: Any) -> Engine:
    """An engine in float32; on the CPU's own operations without a platform."""
    config = EngineConfig.from_options(options)
    platform = platform or Platform(Target(CPU, torch.float32))
    return Engine(start_on(platform, config, open_model(config.load)))


def run(engine: Engine, prompts: Sequence[Sequence[int] | str], *params: SamplingParams) -> list[RequestOutput]:
    """All prompts at once; one set of parameters for all, or one each."""
    each = list(params) * len(prompts) if len(params) == 1 else list(params)
    for i, (prompt, wanted) in enumerate(zip(prompts, each, strict=True)):
        engine.add(engine.make_request(str(i), prompt, wanted))
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        outputs.update((o.request_id, o) for o in engine.step())
        engine.check_integrity()
    return [outputs[str(i)] for i in range(len(prompts))]


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]
