"""A Llama of some shape in GGUF's Q4_0, of random blocks: for engines that read no other format.

Everything that is multiplied is Q4_0, the embedding and the head too (`llama-quantize` would give a head 6 bits). The
vocabulary is the bytes and words that mean nothing. Invariant: tensors are written one after the other, so that the
memory it takes is that of the largest. llama.cpp and qengine both load the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.synthetic import Sizes

#: A block is a scale in float16 and 32 codes of 4 bits.
_BLOCK, _BLOCK_BYTES = 32, 18
#: Codes are drawn evenly from -8 to 7: this is how far they spread.
_CODE_SPREAD = 4.6
_EPS, _ROPE_BASE = 1e-5, 500_000.0
EMBEDDING = "token_embd.weight"


def write_gguf(path: Path, sizes: Sizes, max_position: int) -> int:
    """Write the file.

    Args:
        sizes: inputs of every matrix are a multiple of 32; the vocabulary has at least 257 tokens.
        max_position: what the file says it was made for.

    Returns:
        Bytes of weights that a decode step reads: all but an embedding that is not the head too.
    """
    writer = GGUFWriter(path, "llama")
    _add_metadata(writer, sizes, max_position)
    tensors = dict(_shapes(sizes))
    for name, shape in tensors.items():
        is_matrix = len(shape) == 2
        stored = (shape[0], shape[1] // _BLOCK * _BLOCK_BYTES) if is_matrix else shape
        dtype = np.dtype(np.uint8 if is_matrix else np.float32)
        kind = GGMLQuantizationType.Q4_0 if is_matrix else None
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    num_read = 0
    for name, shape in tensors.items():
        data = _blocks(shape, random) if len(shape) == 2 else np.ones(shape, np.float32)
        writer.write_tensor_data(data)
        num_read += data.nbytes if name != EMBEDDING or sizes.is_tied else 0
    writer.close()
    return num_read


def gguf_bytes(sizes: Sizes) -> int:
    """About how large the file is: its matrices."""
    matrices = (shape for _, shape in _shapes(sizes) if len(shape) == 2)
    return sum(rows * columns // _BLOCK * _BLOCK_BYTES for rows, columns in matrices)


def _shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor as numpy would have it: [outputs, inputs] or [inputs]."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    kv = hidden // sizes.num_heads * sizes.num_kv_heads
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    yield EMBEDDING, (sizes.vocab_size, hidden)
    for number in range(sizes.num_layers):
        yield from ((f"blk.{number}.{name}.weight", shape) for name, shape in layer.items())
    yield "output_norm.weight", (hidden,)
    if not sizes.is_tied:
        yield "output.weight", (sizes.vocab_size, hidden)


def _blocks(shape: tuple[int, ...], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Random codes, with scales that keep the sums of products near one."""
    rows, columns = shape
    blocks = random.integers(0, 256, (rows * columns // _BLOCK, _BLOCK_BYTES), np.uint8)
    blocks[:, :2] = np.array([columns**-0.5 / _CODE_SPREAD], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _add_metadata(writer: GGUFWriter, sizes: Sizes, max_position: int) -> None:
    writer.add_block_count(sizes.num_layers)
    writer.add_context_length(max_position)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_rope_dimension_count(sizes.hidden_size // sizes.num_heads)
    writer.add_layer_norm_rms_eps(_EPS)
    writer.add_rope_freq_base(_ROPE_BASE)
    writer.add_vocab_size(sizes.vocab_size)
    # Byte-level BPE with one merge, since none would be no list.
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "ab"]
    fillers = [f"<{number}>" for number in range(sizes.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *fillers])
    writer.add_token_types([TokenType.NORMAL] * len(tokens) + [TokenType.UNUSED] * len(fillers))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
