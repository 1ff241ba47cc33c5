"""GGUFHeaders: a GGUF file as a HeaderSource, under transformers' names. Without torch.

Invariant: a slot is compared with the tensor table, and the table with the slots.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.formats.gguf_headers import FLOAT_TYPES, SUPPORTED_TYPES, linear_facts
from converters.gguf_config import HEAD, ROPE_FACTORS, read_config
from converters.gguf_file import GGUFTensor, open_gguf
from converters.report import Report, shape_text
from converters.source import LinearKind, LinearSlot, Slot, TensorSlot
from quant_kernels.footprint import WeightFacts

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
#: The config key that counts the heads of each.
HEAD_COUNTS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


class GGUFHeaders:
    """See HeaderSource. `metadata` is the file's own: plain Python values, of which tokenizers are made.

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

    def linear_facts(self, slot: LinearSlot) -> WeightFacts:
        """What the linear will be read as; a bias that the architecture lacks is taken for zeros.

        Raises:
            CheckpointError: if it does not fit the slot.
        """
        self._require(slot)
        name = gguf_name(slot.name)
        bias = self._tensors.get(f"{name}.bias") if slot.has_bias else None
        return linear_facts(self._tensors[f"{name}.weight"], bias)

    def _require(self, slot: Slot) -> None:
        report = Report(self.path)
        self._check_slot(slot, report)
        report.raise_if_any()

    def _check_slot(self, slot: Slot, report: Report) -> list[str]:
        if isinstance(slot, TensorSlot):
            name = tensor_name(slot)
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
        count = HEAD_COUNTS.get(slot.name.rpartition(".")[2])
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


def tensor_name(slot: TensorSlot) -> str:
    """The same of a tensor, whose name has a kind at its end."""
    module, _, kind = slot.name.rpartition(".")
    return f"{gguf_name(module)}.{kind}"
