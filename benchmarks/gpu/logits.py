"""A whole model's logits against transformers, for random models of real widths: is what runs on this card right?

The judge is transformers in the next wider float type, with the same weights expanded; the yardstick is transformers in
the type that qengine computes in. Three ways through a prompt must agree with it: whole, in chunks that mix two
sequences, and token by token through recorded decode steps. Errors are relative to the root mean square of the judge's
logits.

A comparison passes if qengine is at most twice as far from the judge as the yardstick, plus the roundings of the last
matmul, whose result is rounded once and whose sums are those of tensor cores (`quant_kernels.tolerance`).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import random_prompt
from benchmarks.gpu.device import Machine, free_memory
from benchmarks.gpu.engine import LoadedModel, engine_config, load, open_dummy
from benchmarks.gpu.models import LOGIT_CONFIGS, Config
from benchmarks.gpu.peer import transformers_model
from benchmarks.gpu.workloads import Logits, weights_text
from converters.dummy_source import DummySource
from converters.source import TensorSlot
from qengine.request import SamplingParams
from qengine.runtime.device_inputs import DeviceSteps
from qengine.runtime.graphs import DecodeGraphs
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.platform import Platform
from qengine.scheduling.batch import Batch, BatchEntry, SampleSpec
from quant_kernels.tolerance import UNIT_ROUNDOFF

BLOCK_SIZE = 16
#: What the tensor cores' inexact sums may cost, as in `quant_kernels.tolerance`.
SUMS = 3e-5
#: What judges a dtype.
WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
MODES = ("prefill", "chunked", "decode")
#: A greedy token to be sampled, as far as recorded steps ask for one.
_GREEDY = SampleSpec(SamplingParams(temperature=0.0), 0, (), (), frozenset())


class VariedSource(DummySource):
    """Norm weights that are not one, so that a forgotten one shows."""

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        if len(slot.shape) > 1:
            return super().read_tensor(slot)
        return 1.0 + 0.2 * self._normal(slot.name, slot.shape)


class Stepper:
    """Runs a loaded model over sequences at will; every row's logits come back."""

    def __init__(self, loaded: LoadedModel, platform: Platform, lengths: Sequence[int]) -> None:
        model, config, device = loaded.decoder, loaded.opened.config, platform.device
        selector, kv_format = platform.target.selector, platform.kv_format("auto")
        assert selector is not None, "a device of Triton's"
        assert platform.recorder is not None, "decode steps are recorded"
        max_blocks = max(-(-length // BLOCK_SIZE) for length in lengths)
        count = len(lengths)
        # Neighbours in a sequence are not neighbours in the cache.
        self._tables = [tuple(range(i, max_blocks * count, count))[::-1] for i in range(count)]
        self._starts = [0] * count
        self._model = model
        self._cache = KVCache(config, max_blocks * count, BLOCK_SIZE, kv_format, device)
        self._steps = DeviceSteps(config, model.rope, kv_format, BLOCK_SIZE, selector.card, device)
        self._graphs = DecodeGraphs(model, self._cache, self._steps, platform.recorder, count, max_blocks)

    @torch.inference_mode()
    def launch(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """The next tokens of some sequences, launched one by one: float32 logits [tokens, vocab] of each."""
        step = self._steps.prepare(Batch(self._entries(tokens)))
        logits = self._model.logits(self._model.forward(step.token_ids, self._cache.layers, step.inputs))
        rows = zip(tokens, step.first_rows, strict=True)
        return {name: logits[row : row + len(tokens[name])] for name, row in rows}

    @torch.inference_mode()
    def replay(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """One more token of some sequences, as a recorded step: logits [1, vocab] of each."""
        hidden = self._graphs.try_run(self._entries({name: (token,) for name, token in tokens.items()}))
        assert hidden is not None, "every step of single tokens is recorded"
        logits = self._model.logits(hidden)
        return {name: logits[row : row + 1] for row, name in enumerate(tokens)}

    def _entries(self, tokens: Mapping[int, Sequence[int]]) -> tuple[BatchEntry, ...]:
        entries = []
        for name, ids in tokens.items():
            start = self._starts[name]
            self._starts[name] += len(ids)
            blocks = self._tables[name][: -(-self._starts[name] // BLOCK_SIZE)]
            entries.append(BatchEntry(str(name), tuple(ids), start, blocks, _GREEDY))
        return tuple(entries)


def records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the GPU's worker answers for a spec.

    Raises:
        SystemExit: after the last record, if a comparison has failed.
    """
    workload = Logits.from_json(spec["workload"])
    machine, failed = Machine.cuda(torch.bfloat16), []
    for name in workload.models:
        for record in measure(workload, name, LOGIT_CONFIGS[name], machine):
            yield record
            if not record["passed"]:
                failed.append(f"{name}, {record['weights']}, {record['mode']}")
    if failed:
        sys.exit("logits are too far from transformers': " + "; ".join(failed))


def measure(workload: Logits, name: str, config: Config, machine: Machine) -> Iterator[dict[str, Any]]:
    """Records of one model: each kind of weights, each way through the prompts."""
    for quantization in workload.quantizations:
        with tempfile.TemporaryDirectory() as folder:
            opened = open_dummy(Path(folder), config, quantization, machine.device)
            opened = replace(opened, source=VariedSource.open(Path(folder), quantization, 0, machine.device))
            prompts = [random_prompt(n, opened.config.vocab_size, seed) for seed, n in enumerate(workload.lengths)]
            judged = [
                reference_logits(transformers_model(config, opened, dtype, machine.device), prompts)
                for dtype in (WIDER[machine.dtype], machine.dtype)
            ]
            platform = machine.make_platform(False)
            loaded = load(opened, platform, engine_config(memory_limit=None, max_model_len=max(workload.lengths)))
        for mode in MODES:
            found = run(mode, Stepper(loaded, platform, workload.lengths), prompts, workload.decoded)
            skipped = [len(p) - len(f) for p, f in zip(prompts, found, strict=True)]
            judge, yardstick = (
                torch.cat([logits[n:] for logits, n in zip(each, skipped, strict=True)]) for each in judged
            )
            base = {
                "model": name,
                "weights": weights_text(quantization),
                "mode": mode,
                "dtype": str(machine.dtype).split(".")[1],
            }
            yield {**base, **compare(torch.cat(found), yardstick, judge, machine.dtype)}
        free_memory(machine.device)


@torch.inference_mode()
def reference_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [tokens, vocab] of each prompt, all its positions at once."""
    device = next(model.parameters()).device
    return [model(torch.tensor([list(p)], device=device), use_cache=False).logits[0] for p in prompts]


def run(mode: str, stepper: Stepper, prompts: Sequence[Sequence[int]], decoded: int) -> list[torch.Tensor]:
    """Logits of each prompt's positions; of the last `decoded` ones for "decode"."""
    if mode == "prefill":
        return list(stepper.launch(dict(enumerate(prompts))).values())
    if mode == "chunked":
        return chunked(stepper, prompts)
    stepper.launch({i: prompt[:-decoded] for i, prompt in enumerate(prompts)})
    rows = [stepper.replay({i: p[k - decoded] for i, p in enumerate(prompts)}) for k in range(decoded)]
    return [torch.cat([row[i] for row in rows]) for i in range(len(prompts))]


def chunked(stepper: Stepper, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Uneven chunks, in which a single token of one sequence meets many of the other."""
    first, second = prompts
    cuts = sorted({len(first) // 3, len(first) // 3 + 1, len(first)})
    other = sorted({len(second) // 2, len(second) - 1, len(second)})
    parts: list[list[torch.Tensor]] = [[], []]
    at = [0, 0]
    for ends in zip(cuts, other, strict=True):
        tokens = {i: prompts[i][at[i] : end] for i, end in enumerate(ends)}
        for i, logits in stepper.launch(tokens).items():
            parts[i].append(logits)
        at = list(ends)
    return [torch.cat(part) for part in parts]


def compare(got: torch.Tensor, yardstick: torch.Tensor, judge: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of ours and of the yardstick, relative to the judge's root mean square, and whether ours may be so."""
    rms = judge.double().pow(2).mean().sqrt()
    sizes = judge.double().abs() / rms
    rounding = UNIT_ROUNDOFF[dtype] + SUMS
    ours, theirs = ((x.double() - judge.double()).abs() / rms for x in (got, yardstick))
    bounds = (2.0 * theirs.max() + rounding * sizes.max(), 2.0 * theirs.mean() + rounding * sizes.mean())
    top = judge.argmax(dim=-1)
    return {
        "positions": len(judge),
        "max_error": float(ours.max()),
        "mean_error": float(ours.mean()),
        "max_bound": float(bounds[0]),
        "mean_bound": float(bounds[1]),
        "top1": float((got.argmax(dim=-1) == top).double().mean()),
        "peer_max_error": float(theirs.max()),
        "peer_mean_error": float(theirs.mean()),
        "peer_top1": float((yardstick.argmax(dim=-1) == top).double().mean()),
        "passed": bool(ours.max() <= bounds[0]) and bool(ours.mean() <= bounds[1]),
    }
