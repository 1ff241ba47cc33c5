"""The process in which transformers is measured: `python -m benchmarks.engines.huggingface_worker TASK JSON-SPEC`.

Answers one JSON line on stdout. Weights come from the file under test, in bfloat16; no code of a checkpoint runs.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.common import BenchmarkError, Workload, answer, random_prompt, run_worker

_WARM_UP_STEPS = 8
#: Its class methods are untyped.
_Model: Any = AutoModelForCausalLM


def convert(spec: Mapping[str, Any], channel: TextIO) -> None:
    """Save a GGUF file's weights and tokenizer as a folder of bfloat16 safetensors."""
    file = Path(spec["path"])
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = _Model.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
    # What was read from GGUF is marked as quantized and refuses to be saved; the same weights in a plain model do not.
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = _Model.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    tokenizer.save_pretrained(spec["target"])
    plain.save_pretrained(spec["target"])
    answer(channel, {"folder": spec["target"]})


def start(spec: Mapping[str, Any], channel: TextIO) -> None:
    """Load and answer one token; the parent watches the clock."""
    torch.set_num_threads(spec["workload"]["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["path"])
    model = _load_model(spec["path"])
    inputs = tokenizer(spec["text"], return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    answer(channel, {"text": tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])})


def speed(spec: Mapping[str, Any], channel: TextIO) -> None:
    """Time one prompt and the decoding of each batch size, after a short warm-up of each."""
    workload = Workload.from_json(spec["workload"])
    torch.set_num_threads(workload.threads)
    model = _load_model(spec["path"])
    vocab_size, seed = spec["model"]["vocab_size"], spec["round"] * 10_000
    with torch.inference_mode():
        time_prompt(model, _prompts(1, workload.prompt_tokens, vocab_size, seed + 1))
        prompt_s = time_prompt(model, _prompts(1, workload.prompt_tokens, vocab_size, seed + 2))
        decode = {}
        for batch in workload.batches:
            prompts = _prompts(batch, workload.decode_prompt_tokens, vocab_size, seed + 2000)
            time_decode(model, prompts, _WARM_UP_STEPS)
            seconds = time_decode(model, prompts, workload.decode_tokens)
            decode[batch] = batch * workload.decode_tokens / seconds
    facts, value_bytes = spec["model"], torch.bfloat16.itemsize
    record = {
        "prompt": workload.prompt_tokens / prompt_s,
        "decode": decode,
        "weight_bytes_per_token": (facts["layer_params"] + facts["head_params"]) * value_bytes,
        "kv_bytes_per_token": facts["kv_values_per_token"] * value_bytes,
    }
    answer(channel, record)


def time_prompt(model: Any, prompt: torch.Tensor) -> float:
    """Seconds of one forward pass over int64 ids [1, tokens]."""
    begin = time.perf_counter()
    _forward(model, prompt, DynamicCache())
    return time.perf_counter() - begin


def time_decode(model: Any, prompts: torch.Tensor, steps: int) -> float:
    """Seconds of `steps` greedy steps after int64 prompts [batch, tokens]."""
    cache = DynamicCache()
    token_ids = _forward(model, prompts, cache)
    begin = time.perf_counter()
    for _ in range(steps):
        token_ids = _forward(model, token_ids, cache)
    return time.perf_counter() - begin


def _forward(model: Any, token_ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The likeliest next token of each row, int64 [batch, 1]."""
    output = model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return torch.as_tensor(output.logits[:, -1].argmax(dim=-1, keepdim=True))


def _prompts(batch: int, num_tokens: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.tensor([random_prompt(num_tokens, vocab_size, seed + index) for index in range(batch)])


def _load_model(folder: str) -> Any:
    return _Model.from_pretrained(folder, dtype=torch.bfloat16).eval()


if __name__ == "__main__":
    # What transformers raises for a model it cannot read; everything else is a fault and ends in a traceback.
    tasks = {"convert": convert, "start": start, "speed": speed}
    sys.exit(run_worker(tasks, (OSError, ValueError, ImportError, BenchmarkError)))
