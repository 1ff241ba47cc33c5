"""One plan for ranks on several made-up cards: every stage with its own layers and limits, the smallest decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.models import MODELS
from qengine.config import EngineConfig
from qengine.errors import ConfigError, DoesNotFitError
from qengine.parallel.split import stage_layers
from qengine.runtime import rank_service as rank_module
from qengine.runtime.messages import Start
from qengine.runtime.model_bytes import ModelFacts, step_bytes, weight_bytes
from qengine.runtime.opening import open_model_headers, split_opened
from qengine.runtime.planner import RANK_BYTES, Card, Machine, MemoryPlan, make_plan
from qengine.runtime.planning import plan_to_start
from qengine.runtime.rank_planning import plan_ranks, replan_ranks
from tests.engine.fixtures import path
from tests.engine.triton_engine import tiny_folder

GIB = 2**30
LLAMA_70B = {"model": str(MODELS / "llama-3-70b"), "load_format": "dummy", "quantization": "awq"}


def machine(*sizes: float) -> Machine:
    """A card of so many GiB for each rank."""
    return Machine("gpu", tuple(Card("a card", int(size * GIB)) for size in sizes), "float16", has_graphs=False)


def config_of(**options: Any) -> EngineConfig:
    return EngineConfig.from_options({"model": path("llama-awq-g64"), **options})


def plan(sizes: tuple[float, ...], **options: Any) -> MemoryPlan:
    config = config_of(**options)
    return plan_ranks(open_model_headers(config.load), config, machine(*sizes))


def test_one_stage_is_planned_as_ever() -> None:
    config = config_of(tensor_parallel_size=2)
    opened = open_model_headers(config.load)
    expected = plan_to_start(ModelFacts.of(opened), config, machine(1, 1))
    assert plan_ranks(opened, config, machine(1, 1)) == expected


def test_a_stage_has_its_own_layers_and_the_one_with_more_decides() -> None:
    whole, stages = plan((1,)), plan((1, 1), pipeline_parallel_size=2)
    per_layer = whole.cards[0].kv_bytes_per_token // 3
    assert [card.kv_bytes_per_token for card in stages.cards] == [2 * per_layer, per_layer]
    assert {card.num_blocks for card in stages.cards} == {stages.num_blocks}
    assert whole.num_blocks < stages.num_blocks
    assert sum(card.weight_bytes for card in stages.cards) == whole.cards[0].weight_bytes
    assert all(card.free_bytes >= 0 for card in stages.cards)
    assert stages.kv_bytes_per_token == whole.kv_bytes_per_token


def test_unlike_cards_of_each_stage_share_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan((24, 12, 12, 24), **LLAMA_70B, tensor_parallel_size=2, pipeline_parallel_size=2)
    weights = [card.weight_bytes for card in found.cards]
    assert weights[0] > 1.5 * weights[1]
    assert weights[3] > 1.5 * weights[2]
    config = config_of(**LLAMA_70B, tensor_parallel_size=2, pipeline_parallel_size=2, gpu_memory_limit="24,12,12,24")
    opened = open_model_headers(config.load)
    used: list[Any] = []
    monkeypatch.setattr(rank_module, "connect_links", lambda *args: used.append(args[6:8]))
    for rank in range(4):
        start = Start(config, found, rank, "/nowhere", "info", False)
        rank_module._connect(start, opened, torch.device("cpu"))  # type: ignore[arg-type]
    for place, card in enumerate(found.cards):
        stage, (own, shares) = place // 2, used[place]
        shape = split_opened(opened, 2, shares).ranks[place % 2]
        assert (own, shares) == (found.layers_of(stage), found.shares_of(stage))
        assert weight_bytes(ModelFacts.of(opened, own), shape, "gpu", "float16") == card.weight_bytes


def test_weights_stay_where_they_are_when_it_is_planned_again() -> None:
    config = config_of(**LLAMA_70B, tensor_parallel_size=2)
    opened = open_model_headers(config.load)
    before = plan_ranks(opened, config, machine(30, 30))
    assert before.shares == ()
    weights = [card.weight_bytes for card in before.cards]
    free = [replace(card, free_bytes=size * GIB) for card, size in zip(machine(30, 30).cards, (26, 22), strict=True)]
    found = replan_ranks(before, opened, config, machine(30, 30), free, weights)
    assert [card.weight_bytes for card in found.cards] == weights
    assert found.cards[0].kv_bytes_per_token == found.cards[1].kv_bytes_per_token
    assert found.shares == before.shares
    assert found.num_blocks < before.num_blocks
    uneven = plan_ranks(opened, config, replace(machine(30, 30), cards=tuple(free)))
    assert uneven.num_blocks > found.num_blocks
    assert all(card.free_bytes >= 0 and card.num_blocks == found.num_blocks for card in found.cards)


def test_limits_go_to_the_cards_of_their_ranks() -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    even = plan((2, 2, 2, 2), **sizes)
    tight = plan((2, 2, 2, 2), **sizes, gpu_memory_limit="2,2,1,1")
    assert len(tight.cards) == 4
    assert tight.num_blocks < even.num_blocks
    with pytest.raises(ConfigError, match=r"gpu_memory_limit has 3 sizes for 4 card"):
        plan((2, 2, 2, 2), **sizes, gpu_memory_limit="2,2,1")


def test_a_stage_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        plan((1, 0.5), pipeline_parallel_size=2)
    free = next(line.split() for line in str(refused.value).splitlines() if line.startswith("free"))
    assert float(free[1]) > 0 > float(free[3])


QWEN_32B = {"model": str(MODELS / "qwen2.5-32b"), "load_format": "dummy", "quantization": "awq"}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((24, 24), {}),
        ((24, 24), {"gpu_memory_limit": "22,10"}),
        ((12, 24), {"kv_cache_dtype": "int8"}),
        ((24, 24, 12, 12), {"tensor_parallel_size": 2}),
    ],
)
def test_stages_have_the_layers_that_leave_the_most_tokens(sizes: tuple[float, ...], options: dict[str, Any]) -> None:
    """Of all that there are. Embedding, head and logits are in the way on the first card and the last."""
    config = config_of(**QWEN_32B, **options, pipeline_parallel_size=2)
    opened = open_model_headers(config.load)
    found = plan_ranks(opened, config, machine(*sizes))
    whole = ModelFacts.of(opened)
    most = 0
    for first in range(1, 64):
        stages = ModelFacts.of(opened, range(first)), ModelFacts.of(opened, range(first, 64))
        most = max(most, make_plan(replace(whole, stages=stages), config, machine(*sizes)).num_blocks)
    assert found.num_blocks == most
    first, second = found.stage_layers
    assert first + second == 64
    assert (found.layers_of(0), found.layers_of(1)) == (range(first), range(first, 64))


def test_layers_follow_the_memory_of_each_card() -> None:
    """Without the ends of the model: 22 and 10 GiB leave 20.1 and 8.3 GiB for 64 layers."""
    found = plan((24, 24), **QWEN_32B, pipeline_parallel_size=2, gpu_memory_limit="22,10")
    assert found.stage_layers == (48, 16)
    alike = plan((24, 24), **QWEN_32B, pipeline_parallel_size=2)
    assert alike.stage_layers[0] >= alike.stage_layers[1], "logits are on the last card alone"
    assert plan((24, 24, 24), **QWEN_32B, pipeline_parallel_size=3).stage_layers[1] >= 22, "the ends weigh more"


def test_all_stages_take_the_steps_that_the_smallest_card_takes() -> None:
    found = plan((80, 24), **QWEN_32B, pipeline_parallel_size=2)
    assert found.max_num_batched_tokens == 2048


def test_layers_stay_where_they_are_when_it_is_planned_again() -> None:
    config = config_of(**QWEN_32B, pipeline_parallel_size=2)
    opened = open_model_headers(config.load)
    before = plan_ranks(opened, config, machine(24, 12))
    weights = [card.weight_bytes for card in before.cards]
    free = [replace(card, free_bytes=size * GIB) for card, size in zip(machine(24, 12).cards, (20, 12), strict=True)]
    found = replan_ranks(before, opened, config, machine(24, 12), free, weights)
    assert plan_ranks(opened, config, replace(machine(24, 12), cards=tuple(free))).stage_layers < before.stage_layers
    assert found.stage_layers == before.stage_layers
    assert [card.weight_bytes for card in found.cards] == weights
    assert found.num_blocks < before.num_blocks


def test_what_ranks_have_seen_makes_the_plan_smaller_and_never_larger() -> None:
    config = config_of(tensor_parallel_size=2)
    opened = open_model_headers(config.load)
    before = plan_ranks(opened, config, machine(2, 2))
    weights = [card.weight_bytes for card in before.cards]

    def again(free: tuple[float, float], weight_bytes: list[int]) -> MemoryPlan:
        cards = [
            replace(card, free_bytes=int(size * GIB)) for card, size in zip(machine(2, 2).cards, free, strict=True)
        ]
        return replan_ranks(before, opened, config, machine(2, 2), cards, weight_bytes)

    assert again((2, 2), weights).num_blocks == before.num_blocks
    assert again((2, 1.6), weights).num_blocks < before.num_blocks
    heavier = again((2, 2), [weights[0], weights[1] + GIB // 4])
    assert heavier.num_blocks < before.num_blocks
    assert heavier.max_model_len <= before.max_model_len
    with pytest.raises(DoesNotFitError):
        again((2, 0.8), weights)


def test_a_card_that_others_use_is_named_once_and_a_lowered_context_too(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(**LLAMA_70B, pipeline_parallel_size=2)
    opened = open_model_headers(config.load)
    before = plan_ranks(opened, config, machine(25, 25))
    weights = [card.weight_bytes for card in before.cards]
    free = [replace(card, free_bytes=size * GIB) for card, size in zip(machine(25, 25).cards, (24, 22), strict=True)]
    with caplog.at_level("WARNING", logger="qengine"):
        found = replan_ranks(before, opened, config, machine(25, 25), free, weights)
    assert found.max_model_len < before.max_model_len
    short, lowered = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    text = "card 1 (a card) has 22.00 GiB free, less than the 23.00 GiB that gpu_memory_utilization allows"
    assert short.startswith(text)
    assert lowered.startswith(f"max_model_len lowered from the model's 8192 to {found.max_model_len}")


def cpu_machine(num_ranks: int, gib: float = 4) -> Machine:
    return Machine("cpu", (Card("cpu", int(gib * GIB)),) * num_ranks, "float32", has_graphs=False)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_ranks_on_a_cpu_share_its_memory_and_all_they_hold_is_counted(tp: int, pp: int) -> None:
    config = config_of(tensor_parallel_size=tp, pipeline_parallel_size=pp, max_model_len=256)
    opened = open_model_headers(config.load)
    found = plan_ranks(opened, config, cpu_machine(tp * pp))
    weights = steps = per_token = 0
    for layers in stage_layers(3, pp):
        facts = ModelFacts.of(opened, layers)
        for shape in split_opened(opened, tp).ranks:
            local = shape.local(facts.config)
            weights += weight_bytes(facts, shape, "cpu", "float32")
            sizes = {"num_ranks": tp, "kv_number_bytes": 4}
            steps += step_bytes(local, 256, 256, 256, **sizes, has_head=facts.has_head, on_gpu=False)
            per_token += 2 * len(layers) * local.num_kv_heads * 64 * 4
    [card] = found.cards
    assert (card.weight_bytes, card.step_buffer_bytes, card.kv_bytes_per_token) == (weights, steps, per_token)
    assert per_token == 2 * 3 * max(2, tp) * 64 * 4  # Four ranks have a copy each of two heads.
    in_stages, between_stages = pp * tp * (tp > 1), tp * (pp + pp - 1) * (pp > 1)
    assert card.reserve_bytes == tp * pp * RANK_BYTES + (in_stages + between_stages) * 4 * 2**20
    assert card.total_bytes == 4 * GIB
    assert card.free_bytes >= 0


def test_ranks_that_a_cpu_has_no_room_for_are_refused() -> None:
    config = config_of(tensor_parallel_size=2, pipeline_parallel_size=2)
    opened = open_model_headers(config.load)
    one = plan_to_start(ModelFacts.of(opened), config_of(), cpu_machine(1, 0.5))
    assert one.fits
    with pytest.raises(DoesNotFitError, match=r"cpu in 4 ranks") as refused:
        plan_ranks(opened, config, cpu_machine(4, 0.5))
    assert "are missing" in str(refused.value)


def test_a_tied_pipeline_on_a_cpu_has_two_tables(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, tie_word_embeddings=True)
    options: dict[str, Any] = {"model": folder, "load_format": "dummy", "max_model_len": 64}
    config = EngineConfig.from_options({**options, "pipeline_parallel_size": 2})
    opened = open_model_headers(config.load)
    assert opened.tied
    table = opened.config.vocab_size * opened.config.hidden_size * 4
    found = plan_ranks(opened, config, cpu_machine(2))
    alone = plan_to_start(ModelFacts.of(opened), EngineConfig.from_options(options), cpu_machine(1))
    assert found.cards[0].weight_bytes == alone.cards[0].weight_bytes + table


def test_limits_of_gpus_mean_nothing_to_a_cpu() -> None:
    config = config_of(tensor_parallel_size=2, gpu_memory_limit="22,10,10", max_model_len=64)
    assert plan_ranks(open_model_headers(config.load), config, cpu_machine(2)).fits
