"""One layer at a time computes what transformers' whole model computes, for every architecture that is served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from converters.errors import CheckpointError
from converters.layers import GROUPS, LayerRunner, load_head, load_layer, unload, view_layer
from converters.open import open_checkpoint
from converters.skeleton import _MOST, MODEL_TYPES, OpenedModel, Skeleton, _check_sizes
from converters.source import LinearSlot, TensorSlot
from qengine.models.registry import SPECS
from tests.converters.tiny_models import ARCHITECTURES, VOCABULARY, make_model, save_model, tiny_folder

CPU = torch.device("cpu")
WINDOWS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 8},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}


def test_every_architecture_that_is_served() -> None:
    assert {name for spec in SPECS for name in spec.architectures} == set(MODEL_TYPES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_the_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = make_model(architecture, tie_word_embeddings=tied, **WINDOWS.get(architecture, {}))
    source = open_checkpoint(save_model(tmp_path, model, torch.float32))
    opened = OpenedModel.check(source)
    assert opened.tied == tied
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        runner = LayerRunner(opened.skeleton, CPU)
        hidden = source.read_tensor(TensorSlot("model.embed_tokens.weight", (VOCABULARY, 64)))[ids]
        for index in range(opened.skeleton.num_layers):
            layer = load_layer(opened.skeleton, source, index, CPU)
            hidden = runner.run(index, layer, hidden)
            unload(layer)
        found = runner.run(None, load_head(opened.skeleton, source, CPU, tied=tied), hidden)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_is_in_a_group(architecture: str) -> None:
    skeleton = Skeleton(make_model(architecture).config.to_dict() | {"architectures": [architecture]}, "here")
    linears = {slot.name for slot in skeleton.layer(1) if isinstance(slot, LinearSlot)}
    assert {f"model.layers.1.{name}" for names, _ in GROUPS for name in names} == linears


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moving_a_factor_changes_nothing(tmp_path: Path, architecture: str) -> None:
    """Each producer that a view names: its channels times s, its readers' inputs over s, and the layer is the same."""
    source = open_checkpoint(save_model(tmp_path, make_model(architecture), torch.float32))
    skeleton = OpenedModel.check(source).skeleton
    layer: Any = load_layer(skeleton, source, 0, CPU)
    view = view_layer(skeleton, layer, 0, None)
    runner, hidden = LayerRunner(skeleton, CPU), torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    before = runner.run(0, layer, hidden).detach()
    assert [group.producer for group in view.groups] == [producer for _, producer in GROUPS]
    for group in view.groups:
        assert group.producer is not None
        producer: Any = layer.get_submodule(group.producer)
        factors = torch.rand(producer.weight.shape[0]) + 0.5
        channels = group.producer_channels
        with torch.no_grad():
            weights = factors.unsqueeze(1) if isinstance(producer, nn.Linear) else factors
            producer.weight.mul_(weights)
            if getattr(producer, "bias", None) is not None:
                producer.bias.mul_(factors)
            for name in group.names:
                view.linear(name).weight.div_(factors if channels is None else factors[channels])
    assert torch.allclose(runner.run(0, layer, hidden), before, atol=1e-5)


def test_a_skipped_reader_keeps_the_factor_where_it_is(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_folder(tmp_path))
    skeleton = OpenedModel.check(source).skeleton
    layer = load_layer(skeleton, source, 1, CPU)
    view = view_layer(skeleton, layer, 1, re.compile(r"k_proj|layers\.1\.mlp\.up_proj"))
    found = [(group.names, group.producer) for group in view.groups]
    assert found == [
        (("self_attn.q_proj", "self_attn.v_proj"), None),
        (("self_attn.o_proj",), "self_attn.v_proj"),
        (("mlp.gate_proj",), None),
        (("mlp.down_proj",), None),
    ]


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel.*supported: .*LlamaForCausalLM"):
        Skeleton({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "here")


def test_sizes_that_are_not_given_are_the_librarys_to_choose() -> None:
    _check_sizes(dict.fromkeys(_MOST), "here")
    _check_sizes({}, "here")


@pytest.mark.parametrize("key", _MOST)
@pytest.mark.parametrize("value", [10**9, 0, -1, "2", True, 1.5])
def test_sizes_that_no_model_has_are_refused_before_it_is_built(
    key: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.skeleton.import_transformers", lambda: pytest.fail("it is built"))
    with pytest.raises(CheckpointError, match=f"here: {key} is {value!r}, expected a whole number from 1 to "):
        Skeleton({"architectures": ["LlamaForCausalLM"], key: value}, "here")
