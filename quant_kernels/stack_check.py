"""Whether a layer of the vector kernels gives here what plain C gives: asked once, before layers are stacked.

Matmuls have their own check (`linear.cpu_check`), of bits. Attention's sums differ in order between instruction sets,
so here results are only close.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from quant_kernels.attention.kv_format import LayerCache, cache_shapes, plain
from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.native.binding import Library
from quant_kernels.native.structures import Level
from quant_kernels.ops.base import Heads
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.stack import LayerStack, NativeInputs, StackLayer

_HIDDEN, _GROUP, _PROMPT = 32, 32, 37
_HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16)
#: Of a result, that inputs may change which fall to another side when they are rounded to int8.
_ROUNDING = 0.02


@lru_cache
def is_right(library: Library) -> bool:
    """Whether one layer, over a prompt and a step after it, agrees with plain C."""
    first, second = (_run_layer(lib) for lib in (library, library.at(Level.PLAIN, max_threads=1)))
    return bool((first - second).norm() <= _ROUNDING * second.norm())


def _run_layer(library: Library) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = ((_HIDDEN, 128), (64, _HIDDEN), (_HIDDEN, 128), (64, _HIDDEN))
    qkv, out, gate_up, down = (CpuInt8Linear(_random(k, n, generator), library, is_fine=k == 64) for k, n in sizes)
    norm, angles = torch.ones(_HIDDEN), _waves(_PROMPT + 1, _HEADS.head_dim // 2)
    layer = StackLayer(qkv, out, gate_up, down, norm, norm, _HEADS)
    stack = LayerStack(library, [layer], norm, 1e-5, angles.cos(), angles.sin())
    block_ids = [2, 0, 1]
    shapes = cache_shapes(plain(torch.bfloat16), len(block_ids), 16, _HEADS.num_kv_heads, _HEADS.head_dim)
    caches = [LayerCache(plain(torch.bfloat16), *(torch.zeros(shape, dtype=dtype) for shape, dtype in shapes))]
    rows = _waves(_PROMPT + 1, _HIDDEN)
    steps = ((rows[:_PROMPT], 0), (rows[_PROMPT:], _PROMPT))
    results = [stack.run(x.clone(), caches, NativeInputs.of([(start, len(x), block_ids)])) for x, start in steps]
    return torch.cat(results).float()


def _waves(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns).mul(0.7).sin()


def _random(inputs: int, outputs: int, generator: torch.Generator) -> PackedWeight:
    codes = torch.randint(-(2**31), 2**31, (inputs // 8, outputs), generator=generator).to(torch.int32)
    scales = torch.rand(inputs // _GROUP, outputs, generator=generator).mul(0.05).half()
    return PackedWeight(4, codes, scales, _GROUP, inputs, outputs, zero_const=8)
