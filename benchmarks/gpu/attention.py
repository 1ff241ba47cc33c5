"""Attention by itself, with cold caches: decode against the bandwidth of memory, prompts against torch's own kernels.

A call is what one layer of Llama-3-8B runs: the engine's own inputs (`DeviceSteps`), tiles and shares. The cache is one
large pool of random numbers, and every copy of a problem reads other blocks of it, scattered, so that nothing is
left in the L2 cache from the call before (`timing`, `problems.num_copies`). The contender is torch's
`scaled_dot_product_attention` in float16 on keys and values that lie side by side, which no paged cache does for it.
One record per problem and contender; the first sequence's result is compared with float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.common import Spread
from benchmarks.gpu.models import CONFIGS
from benchmarks.gpu.problems import num_copies
from benchmarks.gpu.timing import TimedGraph, copy_bandwidth
from benchmarks.gpu.workloads import Attention, Entries
from qengine.config import ModelConfig
from qengine.layers.rope import RotaryEmbedding
from qengine.models.registry import find_spec
from qengine.models.spec import read_model_config
from qengine.request import SamplingParams
from qengine.runtime.device_inputs import DeviceSteps, StaticInputs
from qengine.scheduling.batch import Batch, BatchEntry, SampleSpec
from quant_kernels.attention.kv_format import KV_FORMATS, KVFormat, KVKind, LayerCache, cache_shapes, read
from quant_kernels.ops.base import Heads, StepInputs
from quant_kernels.ops.triton_ops import TritonOps
from quant_kernels.tolerance import UNIT_ROUNDOFF
from quant_kernels.tuning.card import Card, card_of

CUDA = torch.device("cuda")
MODEL = "llama-3-8b"
BLOCK_SIZE = 16
REPLAYS_PER_ROUND = 5
DTYPE = torch.float16
#: Bytes of the pool; what the contender needs comes on top.
POOL_BYTES = 18 * 2**30
#: Everything but torch's plain one, which would write scores of a whole context to memory.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_SUMS = 3e-5
_GREEDY = SampleSpec(SamplingParams(temperature=0.0), 0, (), (), frozenset())
Call = Callable[[], torch.Tensor]


class Pool:
    """One layer's cache full of random numbers, and blocks of it to hand out."""

    def __init__(self, kv_format: KVFormat, config: ModelConfig, num_blocks: int, device: torch.device) -> None:
        shapes = cache_shapes(kv_format, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.num_blocks = num_blocks
        self.cache = LayerCache(kv_format, *(_random(kv_format, shape, dtype, device) for shape, dtype in shapes))
        self._order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()

    def entries(self, step: Entries, copy: int) -> tuple[BatchEntry, ...]:
        """A step over blocks that no other copy of it has, as long as the pool reaches."""
        needed = [-(-(start + count) // BLOCK_SIZE) for start, count in step]
        at, made = copy * sum(needed), []
        for index, ((start, count), number) in enumerate(zip(step, needed, strict=True)):
            blocks = tuple(self._order[(at + i) % self.num_blocks] for i in range(number))
            at += number
            made.append(BatchEntry(f"{copy}.{index}", (0,) * count, start, blocks, _GREEDY))
        return tuple(made)


def records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the GPU's worker answers for a spec."""
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    for record in measure(Attention.from_json(spec["workload"]), card_of(CUDA)):
        yield {**record, "copy_bytes_per_s": bandwidth}


def measure(workload: Attention, card: Card) -> Iterator[dict[str, Any]]:
    """Records, format by format. torch's attention takes part beside float16, the format it knows."""
    raw = {**CONFIGS[MODEL], "max_position_embeddings": max(e[0] + e[1] for _, step in workload.steps() for e in step)}
    config = read_model_config(raw, find_spec(raw))
    rope = RotaryEmbedding(config.rope, config.head_dim, config.max_position, CUDA)
    for name in workload.formats:
        kv_format = KV_FORMATS[name]
        longest = max(_num_blocks(step) for _, step in workload.steps())
        per_block = BLOCK_SIZE * kv_format.bytes_per_token(config.num_kv_heads, config.head_dim)
        most = max(longest, num_copies(per_block, card.l2_bytes))
        pool = Pool(kv_format, config, min(most, POOL_BYTES // per_block), CUDA)
        steps = DeviceSteps(config, rope, kv_format, BLOCK_SIZE, card, CUDA)
        for kind, step in workload.steps():
            problem = Problem(kind, step, pool, steps, config, card)
            yield from contest(problem, workload.rounds)
        del pool, steps, problem
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Problem:
    """One step over one pool."""

    kind: str
    step: Entries
    pool: Pool
    steps: DeviceSteps
    config: ModelConfig
    card: Card

    @property
    def heads(self) -> Heads:
        return Heads(self.config.num_heads, self.config.num_kv_heads, self.config.head_dim)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that must be read."""
        per_token = self.pool.cache.format.bytes_per_token(self.config.num_kv_heads, self.config.head_dim)
        return sum(start + count for start, count in self.step) * per_token

    @property
    def flop(self) -> int:
        """Operations of both matmuls over the keys that each token sees."""
        seen = sum(count * start + count * (count + 1) // 2 for start, count in self.step)
        return 4 * seen * self.config.num_heads * self.config.head_dim

    @property
    def copies(self) -> int:
        """A step that reads several times the L2 cache leaves nothing of itself there; one copy will do."""
        is_large = self.kv_bytes >= 4 * self.card.l2_bytes
        return 1 if is_large else num_copies(self.kv_bytes, self.card.l2_bytes)

    def query(self) -> torch.Tensor:
        rows = sum(count for _, count in self.step)
        return torch.randn(rows, self.config.num_heads, self.config.head_dim, dtype=DTYPE, device=CUDA)

    def inputs(self, entries: tuple[BatchEntry, ...]) -> StepInputs:
        """As the engine makes them: decode steps for recorded graphs, others for a launch."""
        if any(entry.num_tokens > 1 for entry in entries):
            return self.steps.prepare(Batch(entries)).inputs
        static = StaticInputs(self.steps, len(entries), max(len(e.block_ids) for e in entries))
        static.load(entries)
        return static.inputs

    def own_calls(self) -> list[Call]:
        """qengine's kernel, a call per copy."""
        ops, query = TritonOps(), self.query()
        every = [self.inputs(self.pool.entries(self.step, copy)) for copy in range(self.copies)]
        return [lambda i=i: ops.attend(query, self.heads, self.pool.cache, i, None) for i in every]  # type: ignore[misc]

    def torch_calls(self) -> list[Call]:
        """torch's attention on keys and values side by side, a call per copy."""
        return [self._torch_call() for _ in range(self.copies)]

    def _torch_call(self) -> Call:
        """Sequences that are alike share a call."""
        groups: dict[tuple[int, int], int] = {}
        for entry in self.step:
            groups[entry] = groups.get(entry, 0) + 1
        calls = [self._torch_group(*entry, number) for entry, number in groups.items()]

        def call() -> torch.Tensor:
            with sdpa_kernel(_BACKENDS):
                first, *_ = [each() for each in calls]
            return first

        return call

    def _torch_group(self, start: int, count: int, number: int) -> Call:
        config, context = self.config, start + count

        def make(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(number, heads, tokens, config.head_dim, dtype=DTYPE, device=CUDA)

        query, keys, values = make(config.num_heads, count), *(make(config.num_kv_heads, context) for _ in range(2))
        is_causal = count > 1 and start == 0
        # A chunk's last token sees everything, its first one all but the chunk's others.
        mask = causal_lower_right(count, context) if count > 1 and start else None
        return lambda: F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=True
        )

    def error(self) -> dict[str, float]:
        """How far the last token of the first sequence is from float32, and what it may be (as `test_paged` says)."""
        entries = self.pool.entries(self.step, 0)
        query = self.query()
        got = TritonOps().attend(query, self.heads, self.pool.cache, self.inputs(entries), None)
        start, count = self.step[0]
        blocks = torch.tensor(entries[0].block_ids, device=CUDA)
        keys, values = (t.flatten(0, 1)[: start + count] for t in read(self.pool.cache, blocks, torch.float32))
        row = query[count - 1].float().view(self.config.num_kv_heads, -1, self.config.head_dim)
        weights = torch.softmax(torch.einsum("hgd,chd->hgc", row, keys) * self.heads.scale, dim=-1)
        wanted = torch.einsum("hgc,chd->hgd", weights, values).flatten()
        bound = (UNIT_ROUNDOFF[DTYPE] + _SUMS) * values.abs().max() + UNIT_ROUNDOFF[DTYPE] * wanted.abs()
        difference = (got[count - 1].float() - wanted).abs()
        return {"error": float(difference.max()), "error_bound": float(bound.max())}


def contest(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    """Our time, and torch's where it takes part, in turns."""
    kv_format = problem.pool.cache.format
    base = {
        "kind": problem.kind,
        "format": kv_format.name,
        "batch": len(problem.step),
        "context": max(start + count for start, count in problem.step),
        "rows": sum(count for _, count in problem.step),
        "bytes": problem.kv_bytes,
        "flop": problem.flop,
        "copies": problem.copies,
        "tile": problem.steps.tile(max(count for _, count in problem.step)).name,
        **problem.error(),
    }
    makers: dict[str, Callable[[], Sequence[Call]]] = {"qengine": problem.own_calls}
    if kv_format.dtype == DTYPE:
        makers["torch"] = problem.torch_calls
    graphs: dict[str, TimedGraph] = {}
    for name, make in makers.items():
        try:
            graphs[name] = TimedGraph(make())
        except Exception as error:  # noqa: BLE001  A contender that fails ends its own turn and no more.
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            yield {**base, "contender": name, "status": "unavailable", "why": reason}
    readings: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            readings[name] += graph.microseconds(REPLAYS_PER_ROUND)
    for name, values in readings.items():
        spread = Spread.of(values)
        times = {"us": spread.median, "us_min": spread.low, "us_max": spread.high}
        yield {**base, "contender": name, "status": "measured", **times}


def _num_blocks(step: Entries) -> int:
    return sum(-(-(start + count) // BLOCK_SIZE) for start, count in step)


def _random(kv_format: KVFormat, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of about unit size; bytes with the top bit of their exponent clear, which are finite."""
    if dtype == torch.int16:
        words = torch.randint(-(2**15), 2**15, shape, dtype=dtype, device=device)
        # In place: the pool may be a quarter of the card.
        return words if kv_format.kind == KVKind.INT8 else words.bitwise_and_(~0x4040)
    if dtype == torch.bfloat16 and kv_format.is_scaled:
        return torch.rand(shape, dtype=dtype, device=device).add_(1.0).mul_(0.01)
    return torch.randn(shape, dtype=dtype, device=device)
