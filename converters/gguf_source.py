"""GGUFSource: a GGUF file as a WeightSource, under transformers' names.

llama.cpp stores the rows of q and k of some architectures in the order of its own rope, which turns neighbouring pairs;
they are put back into the half-split order by moving whole rows. Invariant: a slot is compared with the tensor table
before its data are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.formats.gguf import FLOAT_TYPES, SUPPORTED_TYPES, read_linear, read_tensor
from converters.gguf_config import HEAD, ROPE_FACTORS, read_config
from converters.gguf_file import GGUFTensor, open_gguf
from converters.report import Report, shape_text
from converters.source import LinearKind, LinearSlot, Slot, TensorSlot, Weight

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_LAYER_MODULES = {
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
_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
#: Architectures whose q and k are stored in pair order, and the config key that counts the heads of each.
_PAIR_ORDER = ("llama", "mistral")
_HEAD_COUNTS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


class GGUFSource:
    """See WeightSource. `metadata` is the file's own: plain Python values, of which tokenizers are made.

    Raises:
        CheckpointError: if the file is broken, or its architecture is not supported.
    """

    quantization: str | None = "gguf"

    def __init__(self, path: Path) -> None:
        file = open_gguf(path)
        self.path = str(path)
        self.metadata: Mapping[str, Any] = file.metadata
        self.config: Mapping[str, Any] = read_config(file.metadata, file.tensors, self.path)
        self._tensors = file.tensors
        kinds = Counter(tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) > 1)
        self.description = "GGUF " + ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())

    def has_linear(self, name: str) -> bool:
        """Whether the module has weights of its own."""
        return f"{gguf_name(name)}.weight" in self._tensors

    def check(self, slots: Sequence[Slot]) -> None:
        """Compare every slot with the tensor table, and every tensor with the slots.

        Raises:
            CheckpointError: with all problems at once.
        """
        report = Report(self.path)
        used = {ROPE_FACTORS}
        if not any(slot.name == "lm_head" for slot in slots):
            used.add(HEAD)
        for slot in slots:
            used.update(self._check_slot(slot, report))
        for name, tensor in self._tensors.items():
            if name not in used:
                report.leftover(name, str(tensor))
        report.raise_if_any()

    def linear_kind(self, slot: LinearSlot) -> LinearKind:
        """By the types in the tensor table.

        Raises:
            CheckpointError: if it does not fit the slot.
        """
        self._require(slot)
        name = gguf_name(slot.name)
        found = {part: self._tensors.get(f"{name}.{part}") for part in ("weight", "bias")}
        tensors = tuple((part, t.type.name, t.shape) for part, t in found.items() if t is not None)
        return LinearKind(tensors, tensors[0][1] in FLOAT_TYPES)

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """The tensor in the file's float dtype, or expanded to float32.

        Raises:
            CheckpointError: if it does not fit the slot, cannot be read, or holds scales that are not finite.
        """
        self._require(slot)
        return read_tensor(self._tensors[_tensor_name(slot)])

    def read_linear(self, slot: LinearSlot) -> Weight:
        """The linear as a record, or dense if that is how it is stored.

        Raises:
            CheckpointError: if it does not fit the slot, cannot be read, or holds scales that are not finite.
        """
        self._require(slot)
        name = gguf_name(slot.name)
        order = self._row_order(slot)
        bias = self._tensors.get(f"{name}.bias")
        values = None if bias is None else read_tensor(bias)
        if values is not None and not slot.has_bias and not bool(values.any()):
            values = None
        if values is not None and order is not None:
            values = values[order]
        return read_linear(self._tensors[f"{name}.weight"], order, values)

    def _row_order(self, slot: LinearSlot) -> torch.Tensor | None:
        """For each output in half-split order the stored row that holds it; None where they are stored in that order.

        A head of 2h rows is stored as pairs, 0, h, 1, h + 1, ...
        """
        count = _HEAD_COUNTS.get(slot.name.rpartition(".")[2])
        if count is None or self.config["model_type"] not in _PAIR_ORDER:
            return None
        half = self.config["head_dim"] // 2
        return torch.arange(slot.out_features).view(self.config[count], half, 2).transpose(1, 2).reshape(-1)

    def _require(self, slot: Slot) -> None:
        report = Report(self.path)
        self._check_slot(slot, report)
        report.raise_if_any()

    def _check_slot(self, slot: Slot, report: Report) -> list[str]:
        if isinstance(slot, TensorSlot):
            name = _tensor_name(slot)
            self._check_tensor(name, slot.shape, SUPPORTED_TYPES, report)
            return [name]
        weight, bias = f"{gguf_name(slot.name)}.weight", f"{gguf_name(slot.name)}.bias"
        self._check_tensor(weight, (slot.out_features, slot.in_features), SUPPORTED_TYPES, report)
        self._check_heads(slot, weight, report)
        if slot.has_bias or bias in self._tensors:
            self._check_tensor(bias, (slot.out_features,), tuple(FLOAT_TYPES), report)
        return [weight, bias]

    def _check_tensor(self, name: str, shape: tuple[int, ...], types: Sequence[str], report: Report) -> None:
        tensor: GGUFTensor | None = self._tensors.get(name)
        expected = shape_text("/".join(types), shape)
        if tensor is None:
            report.missing(name, expected)
        elif tensor.shape != shape or tensor.type.name not in types:
            report.wrong(name, str(tensor), expected)

    def _check_heads(self, slot: LinearSlot, name: str, report: Report) -> None:
        """q and k must have whole heads, or their rows could not be put in order."""
        count = _HEAD_COUNTS.get(slot.name.rpartition(".")[2])
        if count is None:
            return
        rows = self.config[count] * self.config["head_dim"]
        if rows != slot.out_features or self.config["head_dim"] % 2:
            heads = f"{self.config[count]} heads of {self.config['head_dim']}"
            report.wrong(name, f"asked for with {slot.out_features} outputs", f"{heads}, an even size")


def gguf_name(module: str) -> str:
    """A transformers module name as GGUF spells it; one that GGUF does not know stays as it is."""
    match = _LAYER.fullmatch(module)
    if match and match[2] in _LAYER_MODULES:
        return f"blk.{match[1]}.{_LAYER_MODULES[match[2]]}"
    return _MODULES.get(module, module)


def _tensor_name(slot: TensorSlot) -> str:
    module, _, kind = slot.name.rpartition(".")
    return f"{gguf_name(module)}.{kind}"
