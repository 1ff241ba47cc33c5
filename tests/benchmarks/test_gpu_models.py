"""The parts that run models and attention, on the CPU: interpreted kernels, tiny sizes, and no clock worth reading.

What they measure means nothing here. That every line of them runs does, and that the comparison of logits finds what
is right and what is wrong.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import attention, device, end_to_end, logits, serving, worker
from benchmarks.gpu.engine import engine_config, load, open_dummy, start
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report_attention import sections as attention_sections
from benchmarks.gpu.report_models import end_to_end_sections, logits_section, serving_section
from benchmarks.gpu.workloads import Attention, EndToEnd, Logits, Serving
from tests.benchmarks.tiny import CARD, CPU, SIZES, TINY, PythonRecorder, StoppedClock, machine

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real thing: make gpu-check"),
    # numpy on rows of a tile that no token has.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "architectures": ["LlamaForCausalLM"]},
    "qwen3": {**SIZES, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "mistral": {**SIZES, "architectures": ["MistralForCausalLM"], "sliding_window": 9},
}


@pytest.mark.parametrize(("family", "quantization"), [("llama", "gptq"), ("qwen3", "gptq"), ("mistral", None)])
def test_logits_agree_with_transformers(family: str, quantization: str | None) -> None:
    workload = Logits((family,), (quantization,), lengths=(20, 7), decoded=2)
    config = dict(FAMILIES[family])
    records = list(logits.measure(workload, family, config, machine(torch.float32)))
    assert [r["mode"] for r in records] == list(logits.MODES)
    for record in records:
        assert record["passed"], record
        assert record["max_bound"] < 1e-3
        assert record["top1"] == 1.0
    assert "TOO FAR" not in logits_section(records)


def test_logits_that_are_wrong_do_not_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose norms the peer has and ours has not: what a forgotten weight would look like."""
    real = logits.load

    def forgetful(*arguments: Any) -> Any:
        loaded = real(*arguments)
        loaded.decoder.layers[1].post_norm.weight.fill_(1.0)
        return loaded

    monkeypatch.setattr(logits, "load", forgetful)
    monkeypatch.setattr(logits, "MODES", ("prefill",))
    monkeypatch.setattr(logits, "LOGIT_CONFIGS", FAMILIES)
    monkeypatch.setattr(logits.Machine, "cuda", lambda dtype: machine(torch.float32))
    workload = Logits(models=("llama",), quantizations=("gptq",), lengths=(6, 5), decoded=2)
    found: list[dict[str, Any]] = []
    with pytest.raises(SystemExit, match="llama, 4-bit, groups of 128, prefill"):
        found.extend(logits.records({"workload": workload.to_json()}))
    records = list(logits.measure(workload, "llama", FAMILIES["llama"], machine(torch.float32)))
    assert not records[0]["passed"]
    assert "TOO FAR" in logits_section(records)


@pytest.mark.parametrize("quantization", ["gptq", None])
def test_a_model_end_to_end(quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "CONFIGS", {"tiny": TINY})
    monkeypatch.setattr(end_to_end.Machine, "cuda", lambda dtype: machine(dtype))
    variants = ("graphs", "eager", "KV int8") if quantization else ("graphs",)
    workload = EndToEnd(
        "tiny", quantization, variants, batches=(3,), prompt_tokens=3, decode_tokens=3, prefill_tokens=9, runs=1,
        memory_limit=None,
    )  # fmt: skip
    records = list(end_to_end.records(json.loads(json.dumps({"workload": workload.to_json()}))))
    assert records[0]["what"] == "memory"
    assert records[0]["kv"]["int8"]["tokens"] >= records[0]["kv"]["auto"]["tokens"] > 0
    for variant in workload.variants:
        mine = [r for r in records if r.get("variant") == variant]
        assert [r["what"] for r in mine] == ["prefill", "decode", "peak", "profile"]
        assert mine[1]["tokens_per_s"] > 0
        assert mine[1]["of_bound"] > 0
        assert mine[3]["outside_kernels"] is None
    text = "\n".join(end_to_end_sections(records))
    assert f"| {variants[-1]} | 3 |" in text
    assert f"tiny, {'4' if quantization else '16'}-bit" in text


def test_what_does_not_fit_is_left_out() -> None:
    tiny = machine(torch.float16)
    workload = EndToEnd("tiny", variants=("graphs",), batches=(10**6,), prompt_tokens=3, prefill_tokens=4, runs=1)
    records = list(end_to_end.measure(replace(workload, memory_limit=None), TINY, tiny))
    (decode,) = (r for r in records if r["what"] == "decode")
    assert decode["status"] == "left out"
    assert "KV blocks are needed" in decode["why"]
    assert "left out" in "\n".join(end_to_end_sections(records))


def test_recorded_steps_are_replayed(tmp_path: Any) -> None:
    """Decode steps go through the recorder, so that the figure called graphs is one of graphs."""
    tiny, config = machine(torch.float16), engine_config(memory_limit=None)
    recorder = PythonRecorder()
    platform = replace(tiny.make_platform(False), recorder=recorder)
    loaded = load(open_dummy(tmp_path, TINY, "gptq", CPU), platform, config)
    engine = start(loaded, platform, config)
    for prompt in ([1, 2, 3], [4, 5]):
        engine.add(prompt, 3)
    steps = engine.run()
    assert [(s.num_rows, s.num_sampled) for s in steps] == [(5, 2), (2, 2), (2, 2)]
    assert engine._runner._graphs.num_recorded == 1  # type: ignore[union-attr]
    assert all(s.seconds > 0 for s in steps)


def test_serving_and_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CONFIGS", {"tiny": TINY})
    monkeypatch.setattr(serving.Machine, "cuda", lambda dtype: machine(torch.float32))
    workload = Serving("tiny", 4, prompt_range=(2, 12), output_range=(2, 4), runs=1, peer_requests=2)
    records = list(serving.records(json.loads(json.dumps({"workload": workload.to_json()}))))
    assert [r["contender"] for r in records] == ["qengine", "transformers"]
    asked = serving.draw(workload, 96)
    assert records[0]["output_tokens"] == sum(r.num_tokens for r in asked)
    assert records[1]["output_tokens"] == sum(r.num_tokens for r in asked[:2])
    assert records[1]["timed_requests"] == 2
    assert serving.draw(workload, 96) == asked
    assert "| transformers | 2 |" in serving_section(records)


@pytest.fixture
def small_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    config = {**TINY, "num_attention_heads": 4, "head_dim": 32}
    monkeypatch.setattr(attention, "CUDA", CPU)
    monkeypatch.setattr(attention, "CONFIGS", {attention.MODEL: config})
    monkeypatch.setattr(attention, "TimedGraph", StoppedClock)
    monkeypatch.setattr(attention, "num_copies", lambda num_bytes, l2_bytes: 2)
    monkeypatch.setattr(attention, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(attention, "card_of", lambda device: CARD)
    monkeypatch.setattr(attention, "_BACKENDS", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return


@pytest.mark.usefixtures("small_attention")
def test_attention_of_every_format() -> None:
    steps = (("prompt", ((0, 20),)), ("chunk", ((30, 10),)), ("mixed", ((0, 9), (8, 1), (8, 1))))
    workload = Attention(contexts=(50,), batches=(1, 2), prompts=steps, rounds=1)
    spec = json.loads(json.dumps({"workload": workload.to_json()}))
    records = list(attention.records(spec))
    own = [r for r in records if r["contender"] == "qengine"]
    assert len(own) == 4 * 5
    for record in own:
        assert record["status"] == "measured", record
        assert record["error"] <= record["error_bound"], record
        assert record["copies"] == 2
    others = [r for r in records if r["contender"] == "torch"]
    assert len(others) == 5
    assert {r["kind"] for r in others if r["status"] == "measured"} >= {"decode", "prompt", "mixed"}
    decode = next(r for r in own if r["kind"] == "decode" and r["batch"] == 2)
    # Keys and values of two sequences of 50 tokens, 2 KV heads of 32 numbers of 2 bytes.
    assert decode["bytes"] == 2 * 50 * 2 * 2 * 32 * 2
    prompt = next(r for r in own if r["kind"] == "prompt")
    assert prompt["flop"] == 4 * (20 * 21 // 2) * 4 * 32
    assert "WRONG" not in "\n".join(attention_sections(records))


@pytest.mark.usefixtures("small_attention")
def test_copies_share_no_block() -> None:
    pool = attention.Pool(attention.KV_FORMATS["float16"], attention.read_model_config(TINY, attention.find_spec(TINY)),
                          40, CPU)  # fmt: skip
    step = ((99, 1), (30, 1))
    blocks = [b for copy in range(4) for entry in pool.entries(step, copy) for b in entry.block_ids]
    assert len(blocks) == 4 * (7 + 2)
    assert len(set(blocks)) == len(blocks)


def test_every_part_has_someone_who_measures_it() -> None:
    for part in PARTS:
        if part.kind != "tests":
            assert callable(importlib.import_module(worker.MODULES[part.kind]).records)
    for workload in (part.workload for part in PARTS if part.kind == "end-to-end"):
        assert isinstance(workload, EndToEnd)
        assert workload.model in end_to_end.CONFIGS
        assert set(workload.variants) <= set(end_to_end.VARIANTS)


def test_a_cpu_has_no_profile() -> None:
    done: list[int] = []
    assert device.kernel_seconds(lambda: done.append(1), CPU) is None
    assert done == [1]
    assert device.memory_record(CPU)["card_used"] is None
