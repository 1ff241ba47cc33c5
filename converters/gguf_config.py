"""GGUF's metadata as the keys of config.json.

Invariant: every value has the type that transformers' key has, or a CheckpointError names the metadata key; whether
the numbers make sense together is for the reader of the config. Sliding windows and rope scaling are always stated,
so that no default of the architecture steps in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import CheckpointError
from converters.files import shown
from converters.formats.gguf_headers import FLOAT_TYPES
from converters.gguf_file import GGUFTensor

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
#: Published models have heads of 64 to 256.
MAX_HEAD_DIM = 2**14
#: GGUF's architecture to transformers' class. Files of Mistral models mostly say llama.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, values: Mapping[str, Any], architecture: str, path: str) -> None:
        self._values = values
        self._prefix = f"{architecture}."
        self._path = path

    def whole(self, key: str, default: int | None = None) -> int | None:
        value = self._values.get(self._prefix + key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            # Some architectures state a number per layer; here it must be the same for all.
            value = value[0]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
            raise self.fail(key, value, "one whole number, not negative and below 2**31")
        return value

    def required(self, key: str) -> int:
        value = self.whole(key)
        if value is None:
            raise self.fail(key, None, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self._values.get(self._prefix + key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self.fail(key, value, "a number")
        return value

    def text(self, key: str) -> str | None:
        value = self._values.get(self._prefix + key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, value, "a string")
        return value

    def fail(self, key: str, found: object, expected: str) -> CheckpointError:
        what = "missing" if found is None else shown(found)
        return CheckpointError(f"{self._path}: metadata {self._prefix}{key} is {what}, expected {expected}")


def read_config(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], path: str) -> dict[str, Any]:
    """The keys of config.json that a decoder needs.

    One key is no key of transformers': ``rope_freq_factors``, a list of one divisor for each inverse frequency of rope.
    It is GGUF's form of Llama 3.1's rope scaling and present only where the file has it.

    Raises:
        CheckpointError: for an architecture that is not supported, or values that are missing or of the wrong type.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _CLASSES:
        raise CheckpointError(
            f"{path}: GGUF architecture '{shown(architecture)}' is not supported; supported: {', '.join(_CLASSES)}"
        )
    values = _Metadata(metadata, architecture, path)
    if values.whole("expert_count"):
        raise CheckpointError(f"{path}: a mixture of experts, which is not supported; use a dense model")
    window = values.whole("attention.sliding_window") or None
    windowed_llama = architecture == "llama" and window is not None
    return {
        "architectures": ["MistralForCausalLM" if windowed_llama else _CLASSES[architecture]],
        "model_type": "mistral" if windowed_llama else architecture,
        "vocab_size": tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else values.required("vocab_size"),
        "hidden_size": values.required("embedding_length"),
        "intermediate_size": values.required("feed_forward_length"),
        "num_hidden_layers": values.required("block_count"),
        **_heads(values),
        "hidden_act": "silu",
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": values.required("context_length"),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0,
        "tie_word_embeddings": HEAD not in tensors,
        "torch_dtype": _compute_dtype(tensors),
        "bos_token_id": _token_id(metadata, "bos", path),
        "eos_token_id": _token_id(metadata, "eos", path),
        **_rope(values, tensors, path),
    }


def _heads(values: _Metadata) -> dict[str, int]:
    num_heads = values.required("attention.head_count")
    if num_heads < 1:
        raise values.fail("attention.head_count", num_heads, "at least 1")
    head_dim = values.whole("attention.key_length") or values.required("embedding_length") // num_heads
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise values.fail("attention.key_length", head_dim, f"a head size of 1 to {MAX_HEAD_DIM}")
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.whole(key, head_dim) != head_dim:
            raise values.fail(key, values.whole(key), f"the head size {head_dim}; other sizes are not supported")
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": values.whole("attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
    }


def _rope(values: _Metadata, tensors: Mapping[str, GGUFTensor], path: str) -> dict[str, Any]:
    config: dict[str, Any] = {"rope_theta": values.number("rope.freq_base", 10000.0), "rope_scaling": None}
    kind = values.text("rope.scaling.type") or "none"
    factor = values.number("rope.scaling.factor")
    if factor is None:
        # Files of 2023 name a linear factor so.
        factor = values.number("rope.scale_linear")
        kind = "linear" if factor not in (None, 1.0) and kind == "none" else kind
    if kind != "none" and not (kind == "linear" and factor in (None, 1.0)):
        original = values.whole("rope.scaling.original_context_length")
        config["rope_scaling"] = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    if ROPE_FACTORS in tensors:
        config["rope_freq_factors"] = _rope_factors(tensors[ROPE_FACTORS], _heads(values)["head_dim"], path)
    return config


def _rope_factors(tensor: GGUFTensor, head_dim: int, path: str) -> list[float]:
    if tensor.type.name not in FLOAT_TYPES or tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{path}: {ROPE_FACTORS} is {tensor}, expected F32 [{head_dim // 2}]")
    factors: list[float] = _floats(tensor).tolist()
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise CheckpointError(f"{path}: {ROPE_FACTORS} must hold finite numbers above zero")
    return factors


def _token_id(metadata: Mapping[str, Any], name: str, path: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise CheckpointError(f"{path}: metadata {key} is {shown(value)}, expected a token id")
    return value


def _compute_dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    """Quantized blocks have fp16 scales, so float16 unless the weights say otherwise; norms are float32 in any case."""
    kinds = {tensor.type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    if "BF16" in kinds:
        return "bfloat16"
    return "float32" if kinds == {"F32"} else "float16"


def _floats(tensor: GGUFTensor) -> npt.NDArray[np.floating[Any]]:
    """A small tensor of a float type, flat."""
    data = tensor.file.read(tensor.offset, tensor.num_bytes)
    if tensor.type.name == "BF16":
        # The upper half of a float32.
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    floats: npt.NDArray[np.floating[Any]] = data.view("<f2" if tensor.type.name == "F16" else "<f4")
    return floats
