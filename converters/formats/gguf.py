"""GGUF blocks to PackedWeight, and GGUF's names and metadata to those of transformers.

    Q4_0   | f16 d | 16 bytes |              W = d * (q - 8)    low nibbles are values 0..15, high ones 16..31
    Q4_1   | f16 d | f16 m | 16 bytes |      W = d * q + m
    Q8_0   | f16 d | 32 signed bytes |       W = d * q

Blocks of 32 run along K. Invariant: exact; codes and scales keep their bits, and rows of q and k that llama.cpp stores
interleaved for its rope are put back in half-split order by moving whole rows. Source: ggml's quantization formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from converters.errors import CheckpointError
from converters.gguf_file import GGUFTensor
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import pack_codes

BLOCK = 32
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PACKED_TYPES = ("Q4_0", "Q4_1", "Q8_0")
SUPPORTED_TYPES = (*PACKED_TYPES, *FLOAT_TYPES)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
#: Architectures whose q and k rows are stored interleaved.
_INTERLEAVED = ("llama", "mistral")
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(module: str) -> str:
    """A transformers module name under its GGUF name; unknown ones stay as they are."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match and match[2] in _LAYER_NAMES:
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}"
    return _TOP_NAMES.get(module, module)


def is_interleaved(module: str, architecture: str) -> bool:
    """Whether a module's rows are stored in llama.cpp's rope order."""
    return architecture in _INTERLEAVED and module.endswith(("self_attn.q_proj", "self_attn.k_proj"))


def half_split_rows(num_rows: int, num_heads: int) -> npt.NDArray[np.int64]:
    """For each half-split row the stored row that holds it: per head, pairs (i, i + d/2) are stored side by side."""
    rows = np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2)
    order: npt.NDArray[np.int64] = rows.swapaxes(1, 2).reshape(-1)
    return order


def read_linear(
    tensor: GGUFTensor, rows: npt.NDArray[np.int64] | None, bias: torch.Tensor | None
) -> PackedWeight | DenseWeight:
    """One linear [out, in]; `rows` reorders its outputs.

    Raises:
        CheckpointError: for scales that are not finite.
    """
    data = tensor.read()
    data = data if rows is None else data[rows]
    kind = tensor.type.name
    if kind in FLOAT_TYPES:
        return DenseWeight(_floats(data, kind).view(tensor.shape), bias)
    out_features, in_features = tensor.shape
    blocks = data.reshape(out_features, in_features // BLOCK, tensor.type.block_bytes)
    codes, scales, mins = _decode_blocks(blocks, kind)
    if not np.isfinite(scales).all() or (mins is not None and not np.isfinite(mins).all()):
        raise CheckpointError(f"{tensor.file}: '{tensor.name}' has scales that are NaN or infinity; damaged file")
    bits = 8 if kind == "Q8_0" else 4
    zero_consts = {"Q4_0": 8, "Q8_0": 128, "Q4_1": None}
    return PackedWeight(
        bits=bits,
        codes=pack_codes(torch.from_numpy(codes.reshape(out_features, in_features)).t(), bits),
        scales=torch.from_numpy(scales).t().contiguous(),
        group_size=BLOCK,
        in_features=in_features,
        out_features=out_features,
        zero_const=zero_consts[kind],
        mins=None if mins is None else torch.from_numpy(mins).t().contiguous(),
        bias=bias,
        origin={"format": "gguf", "type": kind},
    )


def _decode_blocks(
    blocks: npt.NDArray[np.uint8], kind: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.float16] | None]:
    """Codes [N, G, 32], scales [N, G] and mins [N, G] or None of blocks [N, G, bytes]."""
    codes: npt.NDArray[np.uint8]
    scales = _half(blocks, 0)
    if kind == "Q8_0":
        # Signed codes are stored with an offset of 128 and the zero point 128: flipping the top bit adds it.
        codes = blocks[..., 2:] ^ np.uint8(0x80)
        return codes, scales, None
    mins = _half(blocks, 2) if kind == "Q4_1" else None
    nibbles = blocks[..., 4:] if kind == "Q4_1" else blocks[..., 2:]
    codes = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=-1)
    return codes, scales, mins


def _half(blocks: npt.NDArray[np.uint8], start: int) -> npt.NDArray[np.float16]:
    values: npt.NDArray[np.float16] = np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0]
    return values


def _floats(data: npt.NDArray[np.uint8], kind: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(FLOAT_TYPES[kind])


def read_tensor(tensor: GGUFTensor) -> torch.Tensor:
    """Any supported tensor as floats of its own shape: in the file's dtype, or float32 where blocks are expanded."""
    data = tensor.read()
    kind = tensor.type.name
    if kind in FLOAT_TYPES:
        return _floats(data, kind).view(tensor.shape)
    blocks = data.reshape(len(data), -1, tensor.type.block_bytes)
    codes, scales, mins = _decode_blocks(blocks, kind)
    values = torch.from_numpy(codes).float()
    values -= {"Q4_0": 8, "Q8_0": 128, "Q4_1": 0}[kind]
    values *= torch.from_numpy(scales).float().unsqueeze(-1)
    if mins is not None:
        values += torch.from_numpy(mins).float().unsqueeze(-1)
    return values.view(tensor.shape)


def model_config(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], where: str) -> dict[str, Any]:
    """The keys of config.json, from GGUF metadata.

    ``rope_freq_factors`` (no key of transformers') holds the divisors of the inverse frequencies, one per pair, where
    the file has them: GGUF's form of Llama 3.1's rope scaling.

    Raises:
        CheckpointError: for an architecture that is not supported, naming those that are.
    """
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise CheckpointError(
            f"{where}: GGUF architecture {str(arch)[:60]!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    vocab = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else get("vocab_size")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": vocab,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "max_position_embeddings": get("context_length"),
        "sliding_window": get("attention.sliding_window"),
        "use_sliding_window": get("attention.sliding_window") is not None,
        "max_window_layers": 0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if get("attention.key_length") is not None:
        config["head_dim"] = get("attention.key_length")
    _add_rope(config, get, tensors, where)
    return config


def _add_rope(config: dict[str, Any], get: Any, tensors: Mapping[str, GGUFTensor], where: str) -> None:
    factors = tensors.get("rope_freqs.weight")
    if factors is not None:
        values = read_tensor(factors).float()
        if not bool((values > 0).all()) or not bool(values.isfinite().all()):
            raise CheckpointError(f"{where}: rope_freqs.weight must hold finite numbers above zero")
        config["rope_freq_factors"] = values.tolist()
    scaling = get("rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        }
