"""The bundled model: real English, and logits equal to transformers' on weights that the gguf package dequantized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from qengine import LLM, SamplingParams
from qengine.config import LoadConfig
from qengine.request import Pooling
from qengine.runtime.locate import locate_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "The quick brown fox jumps over the lazy dog. In 1969, people first walked on the Moon; they said:"
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def exact() -> Iterator[LLM]:
    with LLM(dtype="float32", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def fast() -> Iterator[LLM]:
    with LLM(max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedModel:
    """transformers' Llama on the file's weights, read and dequantized by the gguf package."""
    reader = gguf.GGUFReader(locate_model(LoadConfig()).path)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval().float()
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        state[_module(tensor.name)] = torch.from_numpy(_half_split(tensor.name, values).copy())
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    return model


def _module(name: str) -> str:
    if name.startswith("blk."):
        _, layer, kind, _ = name.split(".")
        return f"model.layers.{layer}.{_NAMES[kind]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _half_split(name: str, values: Any) -> Any:
    """llama.cpp stores rows of q and k in interleaved pairs; transformers wants halves."""
    heads = 9 if "attn_q." in name else 3 if "attn_k." in name else None
    if heads is None:
        return values
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def scores(llm: LLM, text: str) -> tuple[list[int], list[float]]:
    """The text's token ids, and the log-probability of each but the first."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    output = llm.generate(text, params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    ids = output.prompt_token_ids
    return ids, [p[i].logprob for i, p in zip(ids[1:], output.prompt_logprobs[1:], strict=True) if p is not None]


def test_it_knows_the_capital_of_france(exact: LLM, fast: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32)
    for llm in (exact, fast):
        choice = llm.chat(QUESTION, params, use_tqdm=False)[0].outputs[0]
        assert "Paris" in choice.text
        assert choice.finish_reason == "stop"


def test_float32_equals_transformers(exact: LLM, oracle: transformers.PreTrainedModel) -> None:
    ids, mine = scores(exact, TEXT)
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids])).logits[0]
    theirs = torch.log_softmax(logits, dim=-1)
    expected = [float(theirs[i, token]) for i, token in enumerate(ids[1:])]
    assert len(ids) > 20
    assert max(abs(a - b) for a, b in zip(mine, expected, strict=True)) < 1e-3


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_transformers_hidden_states(
    exact: LLM, oracle: transformers.PreTrainedModel, pooling: Pooling
) -> None:
    """In float32, batched and in chunks of one prompt, not normalized: so their length is right, too."""
    texts = [TEXT, "Paris", TEXT * 3]
    outputs = exact.embed(texts, pooling=pooling, normalize=False, use_tqdm=False)
    for output in outputs:
        with torch.inference_mode():
            states = oracle(torch.tensor([output.prompt_token_ids]), output_hidden_states=True).hidden_states[-1][0]
        expected = states[-1] if pooling == "last" else states.mean(0)
        mine = torch.tensor(output.outputs.embedding)
        assert mine.shape == (576,)
        assert float((mine - expected).abs().max()) < 1e-3 * float(expected.abs().max())
        assert float(torch.cosine_similarity(mine, expected, dim=0)) > 1 - 1e-6


def test_bfloat16_on_the_int4_kernel_stays_close(exact: LLM, fast: LLM) -> None:
    """Rounding of scales and activations to 8 bits moves the mean log-probability by a few hundredths at most."""
    _, reference = scores(exact, TEXT)
    _, mine = scores(fast, TEXT)
    assert abs(sum(mine) - sum(reference)) / len(reference) < 0.05


def test_an_int8_cache_changes_next_to_nothing() -> None:
    """The gate of quantized caches: perplexity within 0.5 %, and the likeliest token the same 98 times in 100."""
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    found: dict[str, tuple[float, list[int]]] = {}
    for kv_cache_dtype in ("auto", "int8"):
        with LLM(dtype="float32", max_model_len=1200, kv_cache_dtype=kv_cache_dtype) as llm:
            ids = llm.engine.tokenizer.encode(license_text)[:1100]
            [output] = llm.generate([ids], params, use_tqdm=False)
        records = [r for r in output.prompt_logprobs or () if r is not None]
        mean = sum(r[i].logprob for i, r in zip(ids[1:], records, strict=True)) / len(records)
        found[kv_cache_dtype] = mean, [max(r, key=lambda i: r[i].logprob) for r in records]
    (plain, likeliest), (quantized, others) = found["auto"], found["int8"]
    assert abs(math.expm1(plain - quantized)) < 0.005
    assert sum(a == b for a, b in zip(likeliest, others, strict=True)) / len(others) >= 0.98


def test_many_at_once_equal_one_by_one(exact: LLM) -> None:
    prompts = [TEXT[: 7 * i] for i in range(2, 8)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    together = [o.outputs[0].token_ids for o in exact.generate(prompts, params, use_tqdm=False)]
    alone = [exact.generate(p, params, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]
    assert together == alone
