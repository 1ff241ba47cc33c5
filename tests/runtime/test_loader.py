"""Opening and loading: what is checked before a weight is read, and where defaults and eos ids come from."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.files import Bytes
from converters.read_ahead import ByteRange, DirectReader
from converters.source import LinearSlot, Slot, TensorSlot, Weight
from qengine import LLM, SamplingParams
from qengine.config import LoadConfig
from qengine.errors import LoadError, RequestError
from qengine.models.shapes import slots
from qengine.runtime.loader import load_decoder, load_timed, open_model
from qengine.runtime.opening import slot_of
from quant_kernels.linear.dispatch import Target
from tests.engine.fixtures import NAMES, path

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small GPTQ checkpoint that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(path("llama-gptq-sym-g128"), copy)
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or drop, with None) tensors; underscores stand for dots where a name needs them."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def open_folder(folder: Path, **options: Any) -> Any:
    return open_model(LoadConfig(model=str(folder), **options))


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    edit_weights(
        folder,
        **{
            "model.norm.weight": torch.ones(255),
            "model.layers.0.self_attn.q_proj.scales": None,
            "model.layers.1.mlp.extra.weight": torch.ones(3),
        },
    )
    with pytest.raises(LoadError) as caught:
        open_folder(folder)
    message = str(caught.value)
    assert "model.norm.weight" in message
    assert "255" in message
    assert "model.layers.0.self_attn.q_proj.scales" in message
    assert "model.layers.1.mlp.extra.weight" in message


def test_a_head_that_is_not_there_is_the_embedding_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(folder, **{"lm_head.weight": None})
    with caplog.at_level(logging.WARNING):
        opened = open_folder(folder)
    assert opened.tied
    assert "no lm_head" in caplog.text
    model = load_decoder(opened, Target(CPU, torch.float32), 64)
    assert model.head.parts[0].weight.data_ptr() == model.embedding.table.data_ptr()  # type: ignore[attr-defined]


def test_a_head_of_its_own_is_used_even_if_the_config_ties_it(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    assert not open_folder(folder).tied


def test_end_of_sequence_ids_are_a_union_whatever_the_sampling_defaults(folder: Path) -> None:
    edit_config(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9], "temperature": 0.5}))
    for choice, defaults in (("auto", {"temperature": 0.5}), ("none", {})):
        opened = open_folder(folder, generation_config=choice)
        assert opened.eos_token_ids == {7, 8, 9}
        assert opened.default_sampling == defaults


def test_bad_sampling_defaults_are_dropped_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    defaults = {"temperature": 0.7, "top_p": 1.5, "top_k": 50.5, "min_p": True, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    with caplog.at_level(logging.WARNING):
        opened = open_folder(folder)
    assert opened.default_sampling == {"temperature": 0.7, "repetition_penalty": 1.1}
    assert "top_p is 1.5" in caplog.text


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_a_sampling_default_that_no_float_holds_is_dropped(folder: Path, name: str) -> None:
    (folder / "generation_config.json").write_text(json.dumps({name: 10**400}))
    assert open_folder(folder).default_sampling == {}


def test_greedy_models_have_no_sampling_defaults(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    assert open_folder(folder).default_sampling == {}


@pytest.mark.parametrize("text", ["[]", "{", "\x00"])
def test_a_broken_generation_config_is_refused(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(LoadError, match=r"generation_config\.json"):
        open_folder(folder)


def test_a_generation_config_that_is_not_there(folder: Path) -> None:
    with pytest.raises(LoadError, match="no generation_config"):
        open_folder(folder, generation_config="/no/such/folder")


def test_dummy_weights_need_no_file_and_are_reproducible(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

    def run(**options: Any) -> list[int]:
        with LLM(str(folder), load_format="dummy", max_model_len=64, **options) as llm:
            assert "dummy" in llm.engine.info.description
            return llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids

    first = run()
    assert len(first) == 8
    assert run() == first
    assert run(seed=1) != first
    assert len(run(quantization="awq")) == 8


@pytest.fixture
def bare_folder(folder: Path) -> Path:
    """A folder with a config.json and nothing else."""
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    edit_config(folder, quantization_config=...)
    return folder


def test_a_config_alone_starts_with_dummy_weights_and_takes_token_ids(
    bare_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
    options: dict[str, Any] = {"quantization": "gptq", "bits": 8, "group_size": 32}
    with LLM(str(bare_folder), load_format="dummy", max_model_len=64, **options) as llm:
        assert llm.engine.info.description == "dummy weights, GPTQ 8-bit, group 32"
        answer = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0]
        assert (len(answer.token_ids), answer.text) == (4, "")
        with pytest.raises(RequestError, match="no tokenizer, so it takes token ids and no text"):
            llm.generate("Hello", params, use_tqdm=False)
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "Hello"}], params, use_tqdm=False)
    assert "has no tokenizer" in caplog.text


def test_a_chat_template_does_not_make_a_tokenizer(bare_folder: Path) -> None:
    with (
        LLM(str(bare_folder), load_format="dummy", max_model_len=64, chat_template="{{ messages }}") as llm,
        pytest.raises(RequestError, match="no tokenizer"),
    ):
        llm.chat([{"role": "user", "content": "Hello"}], use_tqdm=False)


def test_real_weights_without_a_tokenizer_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match="has no tokenizer: expected"):
        LLM(str(folder), max_model_len=64)


class NotedReader:
    """Reads, and notes what."""

    def __init__(self) -> None:
        self.ranges: list[ByteRange] = []

    def read(self, wanted: ByteRange) -> Bytes:
        self.ranges.append(wanted)
        return DirectReader().read(wanted)


@pytest.mark.parametrize("name", [*NAMES, None])
def test_what_is_planned_is_what_is_read(name: str | None) -> None:
    opened = open_model(LoadConfig(model=None if name is None else path(name)))
    for shape in slots(opened.config, tied=opened.tied):
        slot, reader = slot_of(shape), NotedReader()
        source = opened.source.read_through(reader)
        planned = opened.source.ranges(slot)
        if isinstance(slot, TensorSlot):
            source.read_tensor(slot)
        else:
            source.read_linear(slot)
        assert list(planned) == sorted(planned, key=lambda part: part.offset)
        # A group index that says nothing is not looked at.
        assert set(reader.ranges) <= set(planned)
        assert sum(part.num_bytes for part in set(planned) - set(reader.ranges)) <= 4 * 1024


@pytest.mark.parametrize("name", [*NAMES, None])
def test_weights_are_asked_for_in_the_order_of_the_plan(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(LoadConfig(model=None if name is None else path(name)))
    asked: list[Slot] = []

    class NotedSource(type(opened.source)):  # type: ignore[misc]
        def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
            asked.append(slot)
            return super().read_tensor(slot)

        def read_linear(self, slot: LinearSlot) -> Weight:
            asked.append(slot)
            return super().read_linear(slot)

    monkeypatch.setattr(opened.source, "__class__", NotedSource)
    load_decoder(opened, Target(CPU, torch.bfloat16), 64)
    planned = [slot_of(shape) for shape in slots(opened.config, tied=opened.tied)]
    assert asked[: len(planned)] == planned
    # The head of a quantized embedding is read a second time, as a linear.
    assert len(asked) - len(planned) == (1 if name is None else 0)


def test_reading_and_converting_are_told_apart(folder: Path) -> None:
    _, times = load_timed(open_folder(folder), Target(CPU, torch.bfloat16), 64)
    tensors = load_file(folder / "model.safetensors").values()
    assert 0 < times.num_bytes <= sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert times.read_seconds > 0
    assert 0 < times.convert_seconds <= times.seconds


def test_the_progress_bar_counts_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_decoder(open_folder(folder), Target(CPU, torch.bfloat16), 64, show_progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Loading weights" in shown.err
    assert "B/s" in shown.err


def test_an_error_while_loading_leaves_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qengine.runtime.loader.build", fail)
    with pytest.raises(KeyboardInterrupt):
        load_decoder(open_folder(folder), Target(CPU, torch.bfloat16), 64)
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_damaged_file_is_told_when_its_data_is_read(folder: Path, value: float) -> None:
    scales = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.scales"]
    scales[-1, -1] = value
    edit_weights(folder, **{"model.layers.0.self_attn.q_proj.scales": scales})
    opened = open_folder(folder)
    with pytest.raises(LoadError, match=r"q_proj\.scales"):
        load_decoder(opened, Target(CPU, torch.float32), 64)
