"""How many launches a decoder layer takes on a GPU: counted, kernels and torch's own operations alike.

Triton's launches are counted where the interpreter runs them; torch's by watching every operation that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime import interpreter

from qengine.layers.linear import Weight
from qengine.models.decoder import Decoder, Materials, build
from qengine.models.registry import find_spec
from qengine.models.shapes import LinearShape, TensorShape
from qengine.models.spec import read_model_config
from qengine.runtime.device_inputs import DeviceSteps
from qengine.scheduling.batch import Batch, BatchEntry
from quant_kernels.attention.kv_format import INT8, KVFormat, LayerCache, cache_shapes, plain
from quant_kernels.linear.dispatch import Target
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TuningTable
from tests.quant_kernels.records import random_record

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
CPU = torch.device("cpu")
MOST_LAUNCHES = 9
#: Operations that make or look at tensors and launch nothing.
_FREE = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "slice", "select", "unsqueeze", "detach", "alias"}


class _Counting(TorchDispatchMode):
    """Counts torch's operations that would be launches."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        # A tensor that is in the wanted type already comes back as it is.
        if name not in _FREE and not (name == "to" and result is args[0]):
            self._counts[f"torch {name}"] += 1
        return result


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts launches by name."""
    counts: Counter[str] = Counter()
    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        # What the interpreter itself does with torch is no launch.
        with torch._C._DisableTorchDispatch():
            return run(self, *args, **kwargs)

    with monkeypatch.context() as patch, _Counting(counts):
        patch.setattr(interpreter.GridExecutor, "__call__", counted)
        yield counts


def decoder(num_layers: int, *, qk_norm: bool, act_order: bool, card: str) -> Decoder:
    """Quantized linears of random codes."""
    family = "Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"
    raw = {
        "architectures": [family],
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
    }
    config = read_model_config(raw, find_spec(raw))

    def read_tensor(shape: TensorShape) -> torch.Tensor:
        return torch.ones(shape.shape)

    def read_linear(shape: LinearShape) -> Weight:
        record = random_record(shape.in_features, shape.out_features, 32, kind="const")
        # Linears with the same input are quantized in the same order.
        perm = torch.randperm(shape.in_features, generator=torch.Generator().manual_seed(1)).int()
        return replace(record, perm=perm) if act_order else record

    selector = Selector(KNOWN_CARDS[card], TuningTable.empty(KNOWN_CARDS[card]))
    materials = Materials(read_tensor, read_linear, Target(CPU, torch.float16, selector))
    return build(config, materials, tied=False, max_position=1024)


def launches(monkeypatch: pytest.MonkeyPatch, model: Decoder, kv_format: KVFormat, contexts: list[int]) -> Counter[str]:
    """Of one decode step."""
    config, block = model.config, 16
    steps = DeviceSteps(config, model.rope, kv_format, block, KNOWN_CARDS["4090"], CPU)
    first, entries = 0, []
    for i, context in enumerate(contexts):
        number = -(-context // block)
        entries.append(BatchEntry(str(i), (1,), context - 1, tuple(range(first, first + number)), None))
        first += number
    shapes = cache_shapes(kv_format, first, block, config.num_kv_heads, config.head_dim)
    caches = [LayerCache(kv_format, *(torch.zeros(s, dtype=d) for s, d in shapes)) for _ in range(config.num_layers)]
    step = steps.prepare(Batch(tuple(entries)))
    with torch.inference_mode(), counting(monkeypatch) as counts:
        model.forward(step.token_ids, caches, step.inputs)
    return counts


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("kv_format", "qk_norm", "act_order", "contexts"),
    [
        pytest.param(plain(torch.float16), False, False, [700], id="one long"),
        pytest.param(INT8, True, True, [700], id="one long, int8, q and k normed, activation order"),
        pytest.param(plain(torch.float16), True, True, [3] * 33, id="33, q and k normed, activation order"),
    ],
)
def test_a_layer_takes_nine_launches_at_most(
    monkeypatch: pytest.MonkeyPatch, kv_format: KVFormat, qk_norm: bool, act_order: bool, contexts: list[int]
) -> None:
    one, two = (
        launches(monkeypatch, decoder(n, qk_norm=qk_norm, act_order=act_order, card="4090"), kv_format, contexts)
        for n in (1, 2)
    )
    layer = two - one
    assert layer["paged_attention_kernel"] == layer["rope_store_kernel"] == 1
    assert layer["add_rms_norm_kernel"] == 2
    assert 6 < layer.total() <= MOST_LAUNCHES, layer
    assert not any(name.startswith("torch") for name in layer), layer
