"""The checkpoint check: what it refuses and names, what it warns of, and that sound models pass unseen."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qengine import LLM, SamplingParams
from qengine.config import LoadConfig
from qengine.errors import LoadError
from qengine.models.decoder import Decoder
from qengine.runtime.checkpoint_check import BadNumbers, Findings, examine, judge
from qengine.runtime.inputs import CpuSteps
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import load_decoder, open_model
from qengine.runtime.runner import ModelRunner
from qengine.runtime.sampler import make_sampler
from quant_kernels.attention.kv_format import KV_FORMATS, KVFormat, plain
from quant_kernels.linear.dispatch import Target
from tests.engine.fixtures import NAMES, path
from tests.engine.triton_engine import start, tiny_folder, triton_platform

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
Change = Callable[[torch.Tensor], torch.Tensor]


def changed(tmp_path: Path, changes: dict[str, Change], *, dtype: str = "float16") -> str:
    """A copy of a small GPTQ checkpoint with some tensors changed."""
    folder = tmp_path / "model"
    shutil.copytree(path("llama-gptq-sym-g128"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    return str(folder)


def with_one(value: float) -> Change:
    """One number of a tensor becomes `value`."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.view(-1)[5] = value
        return copy

    return change


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("model.layers.0.input_layernorm.weight", NAN, r"computes NaN in layer 0 \(attention\)"),
        ("model.layers.1.input_layernorm.weight", NAN, r"computes NaN in layer 1 \(attention\)"),
        ("model.layers.1.post_attention_layernorm.weight", NAN, r"computes NaN in layer 1 \(mlp\)"),
        ("model.layers.2.post_attention_layernorm.weight", INF, r"in layer 2 \(mlp\)"),
        ("model.norm.weight", INF, r"computes infinity in the final norm"),
        ("lm_head.weight", NAN, r"computes NaN in the head"),
    ],
)
def test_the_first_bad_place_is_named(tmp_path: Path, tensor: str, value: float, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        LLM(changed(tmp_path, {tensor: with_one(value)}), max_model_len=64)
    assert "download it again" in str(caught.value)
    assert "--skip-check" in str(caught.value)


def test_an_embedding_of_nothing_but_nan_is_named(tmp_path: Path) -> None:
    folder = changed(tmp_path, {"model.embed_tokens.weight": lambda table: table * NAN})
    with pytest.raises(LoadError, match="computes NaN in the embedding"):
        LLM(folder, max_model_len=64)


def test_a_bad_scale_is_found_when_it_is_read(tmp_path: Path) -> None:
    folder = changed(tmp_path, {"model.layers.2.mlp.up_proj.scales": with_one(NAN)})
    with pytest.raises(LoadError, match=r"layers\.2\.mlp\.up_proj\.scales has 1 values that are NaN"):
        LLM(folder, max_model_len=64, skip_check=True)


@pytest.mark.parametrize(("stored", "says"), [("bfloat16", "overflows float16: "), ("float16", "computes ")])
def test_an_overflow_of_float16_is_named_where_the_model_was_made_in_bfloat16(
    tmp_path: Path, stored: str, says: str
) -> None:
    large = {f"model.layers.1.mlp.{part}_proj.scales": lambda scales: scales * 1000 for part in ("gate", "up")}
    folder = changed(tmp_path, large, dtype=stored)
    with pytest.raises(LoadError, match=rf"{says}.*in layer 1 \(mlp\)") as caught:
        LLM(folder, max_model_len=64, dtype="float16")
    assert ("use --dtype bfloat16" in str(caught.value)) == (stored == "bfloat16")
    LLM(folder, max_model_len=64, dtype="bfloat16").shutdown()


def test_the_check_can_be_skipped(tmp_path: Path) -> None:
    folder = changed(tmp_path, {"model.layers.1.input_layernorm.weight": with_one(NAN)})
    with LLM(folder, max_model_len=64, skip_check=True) as llm:
        assert llm.engine.num_free_blocks > 0


def test_one_answer_to_everything_is_worth_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(tmp_path, {"model.norm.weight": torch.zeros_like})
    with LLM(folder, max_model_len=64) as llm:
        assert len(llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 2
    assert "answers every input with the same token (id 0)" in caplog.text


def test_dummy_weights_are_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qengine.runtime.worker.examine", lambda *parts, **limits: Findings(constant_token_id=3))
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": 64}
    LLM(tiny_folder(tmp_path), **options).shutdown()
    assert "same token" not in caplog.text
    LLM(path(NAMES[0]), max_model_len=64).shutdown()
    assert "same token (id 3)" in caplog.text


@pytest.mark.parametrize("name", [*NAMES, None])
def test_sound_models_pass(name: str | None, caplog: pytest.LogCaptureFixture) -> None:
    options = {"model": None if name is None else path(name), "max_model_len": 64}
    with caplog.at_level(logging.INFO, "qengine"), LLM(**options) as llm:
        assert llm.engine.info.start_seconds["warm-up"] > 0
    assert "same token" not in caplog.text
    assert "warm-up" in caplog.text


# On several ranks


def test_one_of_several_ranks_warns_for_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = changed(tmp_path, {"model.norm.weight": torch.zeros_like})
    LLM(folder, max_model_len=64, device="cpu", tensor_parallel_size=2).shutdown()
    assert capfd.readouterr().err.count("answers every input with the same token (id 0)") == 1


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 3}])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_ranks_name_the_layer_of_the_whole_model(tmp_path: Path, sizes: dict[str, int], layer: int) -> None:
    folder = changed(tmp_path, {f"model.layers.{layer}.post_attention_layernorm.weight": with_one(NAN)})
    with pytest.raises(LoadError, match=rf"computes NaN in layer {layer} \(mlp\)"):
        LLM(folder, max_model_len=64, device="cpu", **sizes)


# In small caches


def loaded(folder: str) -> Decoder:
    return load_decoder(open_model(LoadConfig(model=folder)), Target(CPU, torch.float32), 64)


def runner_of(model: Decoder, cache: KVCache) -> ModelRunner:
    steps = CpuSteps(model.rope, cache, model.dtype)
    return ModelRunner(model, cache, steps, make_sampler(on_triton=False))


@pytest.mark.parametrize("kv_format", [plain(torch.float32), KV_FORMATS["int8"]])
@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 2), (1, 16), (3, 4), (64, 2)])
@pytest.mark.parametrize(("max_len", "max_rows"), [(1, 1), (5, 3), (64, 256)])
def test_the_check_fits_any_cache(
    num_blocks: int, block_size: int, max_len: int, max_rows: int, kv_format: KVFormat, tmp_path: Path
) -> None:
    model = loaded(changed(tmp_path, {"model.norm.weight": torch.zeros_like}))
    runner = runner_of(model, KVCache(model.config, num_blocks, block_size, kv_format, CPU))
    found = examine(runner, max_len=max_len, max_rows=max_rows)
    assert found.bad is None
    # A few rows may agree by chance, many do not.
    assert found.constant_token_id == (0 if num_blocks * block_size >= 12 and max_rows >= 8 else None)


def test_no_nan_is_left_in_the_cache(tmp_path: Path) -> None:
    model = loaded(changed(tmp_path, {"model.layers.0.input_layernorm.weight": with_one(NAN)}))
    cache = KVCache(model.config, 8, 16, plain(torch.float32), CPU)
    found = examine(runner_of(model, cache), max_len=64, max_rows=64)
    assert found.bad == BadNumbers(0, "attention", has_nan=True, has_inf=False)
    for layer in cache.layers:
        assert layer.keys.isfinite().all()
        assert layer.values.isfinite().all()


def test_on_tritons_kernels(tmp_path: Path) -> None:
    folder = changed(tmp_path, {"model.layers.1.post_attention_layernorm.weight": with_one(NAN)})
    with pytest.raises(LoadError, match=r"NaN in layer 1 \(mlp\)"):
        start(triton_platform(), model=folder, max_model_len=64)


def test_findings_without_a_fault_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    judge(Findings(), "m", torch.float16, None)
    assert not caplog.records
