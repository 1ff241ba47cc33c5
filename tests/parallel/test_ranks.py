"""A model split over ranks and stages is the same model: in float32 its logits to roundings, and its tokens exactly.

Six checkpoints written by other programs against tokens that were computed independently; tiny models with 231 and 107
groups, ragged heads, biases, norms of heads, activation orders and tied heads against the same model on one rank.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from qengine.config import LoadConfig, ModelConfig, RopeConfig
from qengine.layers.linear import Weight
from qengine.models.decoder import Decoder, Materials, build
from qengine.models.shapes import EMBEDDING, LinearShape, TensorShape, slots
from qengine.parallel.group import TPGroup
from qengine.parallel.split import TPSplit, split_model, stage_layers
from qengine.runtime.loader import load_decoder, open_model
from qengine.runtime.opening import split_opened
from quant_kernels.attention.kv_format import plain
from quant_kernels.linear.dispatch import Target
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from tests.engine.fixtures import NAMES, expected, path
from tests.models.in_memory import CPU, CPU_TARGET, Sequences
from tests.parallel.ranks import MakeSequences, Ranks
from tests.parallel.threads import Baton, ThreadHub, ThreadTransport
from tests.quant_kernels.records import random_record

#: Tensor-parallel ranks, pipeline stages.
LAYOUTS = [(2, 1), (3, 1), (1, 2), (2, 2)]


def layout_name(layout: tuple[int, int]) -> str:
    return f"tp{layout[0]} pp{layout[1]}"


def greedy(model: Sequences | Ranks, prompts: Mapping[str, Sequence[int]], num_tokens: int) -> dict[str, list[int]]:
    """The likeliest tokens after each prompt, all prompts in one batch."""
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    step = model.step(prompts)
    for _ in range(num_tokens):
        for name, logits in step.items():
            tokens[name].append(int(logits[-1].argmax()))
        step = model.step({name: found[-1:] for name, found in tokens.items()})
    return tokens


@pytest.mark.parametrize("layout", [*LAYOUTS, (4, 1)], ids=layout_name)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_give_the_tokens_that_others_computed(name: str, layout: tuple[int, int]) -> None:
    opened = open_model(LoadConfig(path(name)))
    num_ranks, num_stages = layout
    ranks = Ranks(
        split_opened(opened, num_ranks),
        stage_layers(opened.config.num_layers, num_stages),
        lambda group, layers: load_decoder(opened, CPU_TARGET, 256, group=group, layers=layers),
    )
    wanted = {str(i): want for i, want in enumerate(expected(name))}
    prompts = {i: want.prompt_token_ids for i, want in wanted.items()}
    assert greedy(ranks, prompts, 24) == {i: want.greedy_token_ids for i, want in wanted.items()}


# Tiny models


def tiny(intermediate: int, heads: tuple[int, int] = (14, 2), num_layers: int = 3, **changes: Any) -> ModelConfig:
    config = ModelConfig(
        architecture="llama",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=intermediate,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=16,
        max_position=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=False,
        windows=(None,) * num_layers,
    )
    return replace(config, **changes)


class TinySource:
    """Weights that follow from their names: 4 bits in groups, or dense; head and embedding dense."""

    def __init__(self, config: ModelConfig, group_size: int, *, act_order: bool = False, kind: str = "zeros") -> None:
        self.config = config
        self.group_size = group_size
        self.act_order = act_order
        self.kind = kind

    def read_tensor(self, shape: TensorShape) -> torch.Tensor:
        scale, middle = (0.1, 1.0) if len(shape.shape) == 1 else (1.0, 0.0)
        return torch.randn(shape.shape, generator=random(shape.name)) * scale + middle

    def read_linear(self, shape: LinearShape) -> Weight:
        if not shape.name.startswith("model.layers."):
            # A tied head reads the embedding's table.
            weight = torch.randn(
                shape.out_features, shape.in_features, generator=random(shape.name.removesuffix(".weight") + ".weight")
            )
            return DenseWeight(weight)
        record = random_record(
            shape.in_features,
            shape.out_features,
            self.group_size,
            kind=self.kind,
            act_order=self.act_order,
            bias=shape.has_bias,
            seed=random(shape.name).initial_seed() % 2**31,
        )
        # Linears with the same input are quantized in the same order.
        perm = torch.randperm(shape.in_features, generator=random(str(shape.in_features))).int()
        return replace(record, perm=perm) if self.act_order else record

    def build(self, group: TPGroup | None = None, layers: range | None = None, target: Target = CPU_TARGET) -> Decoder:
        materials = Materials(self.read_tensor, self.read_linear, target)
        tied = self.config.tie_word_embeddings
        return build(self.config, materials, tied=tied, max_position=64, group=group, layers=layers)

    def split(self, num_ranks: int, weights: Sequence[float] | None = None) -> TPSplit:
        return split_model(self.config, num_ranks, down_groups={self.group_size}, weights=weights)

    def ranks(
        self, num_ranks: int, num_stages: int = 1, target: Target = CPU_TARGET, make: MakeSequences = Sequences
    ) -> Ranks:
        return Ranks(
            self.split(num_ranks),
            stage_layers(self.config.num_layers, num_stages),
            lambda group, layers: self.build(group, layers, target),
            make,
        )


def random(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big"))


def prompts() -> dict[str, list[int]]:
    return {
        name: torch.randint(0, 300, (length,), generator=random(name)).tolist()
        for name, length in (("a", 23), ("b", 5))
    }


def tolerance(config: ModelConfig, logits: torch.Tensor) -> float:
    """How far another order of additions may move logits.

    Matmuls add in vector lanes and blocks, so a sum of thousands is rounded some 16 times in a row, which moves it by
    about sqrt(16) / 2**24 of its size. A layer has four sums one after the other, and does not make what they leave
    grow; four times that is allowed.
    """
    return float(4 * config.num_layers * 4 * math.sqrt(16) * 2**-24 * logits.abs().max())


def check_same(source: TinySource, ranks: Ranks, single: Sequences | None = None) -> None:
    """Logits of a mixed and chunked schedule within the tolerance, and equal greedy tokens after it."""
    single = single or Sequences(source.build())
    given = prompts()
    for chunk in ({"a": given["a"][:7]}, {"b": given["b"], "a": given["a"][7:8]}, {"a": given["a"][8:]}):
        wanted, found = single.step(chunk), ranks.step(chunk)
        for name, logits in wanted.items():
            assert (found[name] - logits).abs().max() < tolerance(source.config, logits)
    again = {name: [ids[0]] for name, ids in given.items()}
    assert greedy(ranks, again, 12) == greedy(single, again, 12)


SOURCES = {
    "231 groups": TinySource(tiny(231 * 32), 32),
    "107 groups, activation order": TinySource(tiny(107 * 32), 32, act_order=True),
    "107 groups, mins, norms of heads": TinySource(tiny(107 * 32, qk_norm=True), 32, kind="mins"),
    "biases, activation order, tied": TinySource(
        tiny(512, qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True), 64, act_order=True
    ),
    "one group, activation order": TinySource(tiny(512), 512, act_order=True),
    "windows, biases of q, k, v": TinySource(tiny(512, qkv_bias=True, windows=(None, 6, 3)), 128),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, (4, 1), (1, 3), (3, 2)], ids=layout_name)
@pytest.mark.parametrize("name", SOURCES)
def test_tiny_models_stay_the_same(name: str, layout: tuple[int, int]) -> None:
    source = SOURCES[name]
    check_same(source, source.ranks(*layout))


@pytest.mark.parametrize(
    ("heads", "num_ranks"), [((8, 8), 3), ((6, 1), 4), ((12, 4), 3), ((5, 5), 5)], ids=lambda value: str(value)
)
def test_other_ratios_of_heads(heads: tuple[int, int], num_ranks: int) -> None:
    source = TinySource(tiny(512, heads), 32, act_order=True)
    check_same(source, source.ranks(num_ranks))


def test_unlike_cards() -> None:
    source = TinySource(tiny(107 * 32, (16, 8)), 32)
    layers = range(source.config.num_layers)
    ranks = Ranks(source.split(2, [22, 10]), [layers], source.build)
    assert [model.config.intermediate_size for model in ranks.models] == [74 * 32, 33 * 32]
    assert [model.config.num_kv_heads for model in ranks.models] == [6, 2]
    check_same(source, ranks)


def test_parts_are_what_the_split_says() -> None:
    """116 + 115 groups; 4 + 3 query heads of each kv head, and a copy of that head alone; the vocabulary in tiles."""
    source = SOURCES["231 groups"]
    halves = source.ranks(2).models
    assert [m.layers[0].mlp.down.in_features for m in halves] == [116 * 32, 115 * 32]
    assert [m.layers[0].mlp.gate_up.out_features for m in halves] == [2 * 116 * 32, 2 * 115 * 32]
    quarters = source.ranks(4).models
    assert [m.layers[0].attention.qkv.out_features // 16 for m in quarters] == [4 + 2, 3 + 2, 4 + 2, 3 + 2]
    assert [m.config.num_kv_heads for m in quarters] == [1, 1, 1, 1]
    assert all(m.embedding is not None and m.head is not None for m in quarters)
    assert [len(m.embedding.table) for m in halves if m.embedding] == [256, 44]
    assert [m.head.out_features for m in halves if m.head] == [256, 44]


def test_stages_have_their_own_layers_alone() -> None:
    source = SOURCES["windows, biases of q, k, v"]
    first, second = source.ranks(1, 2).models
    assert (first.config.num_layers, second.config.num_layers) == (2, 1)
    assert (first.config.windows, second.config.windows) == ((None, 6), (3,))
    assert first.embedding is not None
    assert first.norm is first.head is None
    assert second.embedding is None
    assert second.norm is not None
    names = [linear.name for linear in second.linears()]
    assert names[0] == "model.layers.2.self_attn.qkv_proj"
    assert names[-1] == "lm_head"


def test_a_tied_table_is_held_once_on_a_rank_and_twice_in_a_pipeline() -> None:
    source = SOURCES["biases, activation order, tied"]
    for model in source.ranks(2).models:
        assert model.embedding is not None
        assert model.head is not None
        assert model.head.parts[0].weight is model.embedding.table  # type: ignore[attr-defined]
    _, last = source.ranks(1, 2).models
    assert last.head is not None
    assert last.head.out_features == 300


def test_a_step_takes_two_sums_a_layer() -> None:
    """And one for the embedding and a gathering for the head: nothing else is handed over between ranks."""
    source = SOURCES["107 groups, activation order"]
    ranks = source.ranks(2)
    ranks.step({"a": [1, 2, 3]})
    for group, _, _ in ranks.parts:
        assert group.transport.num_calls == 2 * source.config.num_layers + 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [range(3), range(1), range(1, 3), range(1, 2)], ids=str)
def test_a_rank_reads_its_stage_in_the_order_of_its_slots(stage: range, tied: bool) -> None:
    """So a reader can read ahead. A tied table may be asked for twice: as an embedding, and as a head."""
    source = TinySource(tiny(512, qk_norm=True, tie_word_embeddings=tied), 32, act_order=True)
    asked: list[str] = []

    def read_tensor(shape: TensorShape) -> torch.Tensor:
        asked.append(shape.name)
        return source.read_tensor(shape)

    def read_linear(shape: LinearShape) -> Weight:
        asked.append(shape.name)
        return source.read_linear(shape)

    materials = Materials(read_tensor, read_linear, CPU_TARGET)
    transport = ThreadTransport(ThreadHub(2, Baton()), 1)
    build(source.config, materials, tied=tied, max_position=8, group=TPGroup(transport, source.split(2)), layers=stage)
    wanted = [shape.name for shape in slots(source.config, tied=tied, layers=stage)]
    if tied and stage == range(3):
        wanted.append(EMBEDDING)
    assert [name.removesuffix(".weight") for name in asked] == [name.removesuffix(".weight") for name in wanted]


def test_only_one_linear_is_whole_at_a_time() -> None:
    """What a rank reads is cut before it reads the next: readers never see two whole weights alive."""
    source = TinySource(tiny(512), 32, act_order=True)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def read_linear(shape: LinearShape) -> Weight:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        weight = source.read_linear(shape)
        if isinstance(weight, PackedWeight):
            alive.append(weakref.ref(weight.codes))
        return weight

    # Nobody is on the other side: building hands nothing over.
    transport = ThreadTransport(ThreadHub(2, Baton()), 0)
    materials = Materials(source.read_tensor, read_linear, CPU_TARGET)
    build(source.config, materials, tied=False, max_position=64, group=TPGroup(transport, source.split(2)))
    assert len(alive) == 7 * source.config.num_layers
    assert most == 0


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=layout_name)
def test_bfloat16_is_close(layout: tuple[int, int]) -> None:
    """On torch's int4 kernel, whose order of additions differs with the shape, and with sums rounded on each rank.

    A rounding of every layer's residual is half of 2**-8 of it; a dozen of them add up like a random walk.
    """
    target = Target(CPU, torch.bfloat16)
    source = TinySource(tiny(107 * 32), 32, act_order=True)
    ranks = source.ranks(*layout, target, lambda model: Sequences(model, kv_format=plain(torch.bfloat16)))
    assert {part.kernel for m in ranks.models for linear in m.linears() for part in linear.parts} == {
        "cpu_int4",
        "dense",
    }
    single = Sequences(source.build(target=target), kv_format=plain(torch.bfloat16))
    wanted, found = single.step(prompts()), ranks.step(prompts())
    for name, logits in wanted.items():
        difference = (found[name] - logits).abs()
        assert difference.max() < 12 * 2**-8 * logits.abs().max()
        assert difference.mean() < 4 * 2**-8 * logits.abs().mean()
