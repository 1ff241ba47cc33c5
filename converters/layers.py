"""One decoder layer at a time: given weights, described to a quantizer, run on hidden states, emptied again.

Invariant: a layer computes what transformers' model would compute, in float32: the same modules, positions and masks.
No more than one layer has weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from converters.quantizers import LayerView, LinearGroup, QuantizationError
from converters.skeleton import EMBEDDING, HEAD, Skeleton, layer_name
from converters.source import LinearSlot, Slot, TensorSlot, WeightSource
from quant_kernels.reference import to_dense

_NORM = "model.norm"
#: Linears that read the same tensor, and what makes it; in the order in which a layer runs them.
GROUPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), "self_attn.v_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), "mlp.up_proj"),
)
_LINEAR_PRODUCERS = ("self_attn.v_proj", "mlp.up_proj")


class Head(nn.Module):
    """The last norm and the output projection: [B, T, hidden] to logits."""

    def __init__(self, norm: nn.Module, lm_head: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.lm_head = lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, vocabulary]."""
        logits: torch.Tensor = self.lm_head(self.norm(hidden))
        return logits


class LayerRunner:
    """Runs the layers of one model.

    Args:
        device: that computes.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        self._skeleton = skeleton
        self._device = device
        self._rotary = skeleton.rotary(device)

    def run(self, index: int | None, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The output of layer `index` (None: the head) for hidden states [B, T, width] of sequences from the start."""
        if index is None:
            head: torch.Tensor = module(hidden)
            return head
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).unsqueeze(0)
        output: Any = module(
            hidden,
            attention_mask=self._mask(length, self._skeleton.window(index)),
            position_ids=positions,
            position_embeddings=self._rotary(hidden, positions),
        )
        values: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return values

    def _mask(self, length: int, window: int | None) -> torch.Tensor | None:
        """True where a position is seen, [1, 1, T, T]; None is plainly causal."""
        if window is None or length <= window:
            return None
        places = torch.arange(length, device=self._device)
        distance = places.unsqueeze(1) - places
        return ((distance >= 0) & (distance < window)).view(1, 1, length, length)


# Weights


def load_layer(skeleton: Skeleton, source: WeightSource, index: int, device: torch.device) -> nn.Module:
    """A decoder layer with its weights, float32, on the device.

    Raises:
        CheckpointError: if they cannot be read.
    """
    module = skeleton.empty_layer(index)
    prefix = layer_name(index) + "."
    for slot in skeleton.layer(index):
        _fill(module, slot, slot.name.removeprefix(prefix), source, device)
    return module


def load_head(skeleton: Skeleton, source: WeightSource, device: torch.device, *, tied: bool) -> Head:
    """The last norm and the head, float32; where they are tied, the head is a copy of the embedding."""
    norm, linear = skeleton.empty_end()
    head = Head(norm, linear)
    for slot in skeleton.after(tied=False):
        own = slot.name.removeprefix("model.")
        if tied and isinstance(slot, LinearSlot):
            table = source.read_tensor(TensorSlot(f"{EMBEDDING}.weight", (slot.out_features, slot.in_features)))
            linear.weight = _parameter(table, device)
        else:
            _fill(head, slot, own, source, device)
    return head


def unload(module: nn.Module) -> None:
    """Let go of the weights."""
    module.to("meta")


def _fill(module: nn.Module, slot: Slot, name: str, source: WeightSource, device: torch.device) -> None:
    if isinstance(slot, TensorSlot):
        path, _, kind = name.rpartition(".")
        setattr(module.get_submodule(path), kind, _parameter(source.read_tensor(slot), device))
        return
    dense = to_dense(source.read_linear(slot), torch.float32)
    linear: Any = module.get_submodule(name)
    linear.weight = _parameter(dense.weight, device)
    # A bias that the architecture lacks may be in the file.
    linear.bias = None if dense.bias is None else _parameter(dense.bias, device)


def _parameter(tensor: torch.Tensor, device: torch.device) -> nn.Parameter:
    # A copy of its own, also where it is float32 already: quantizers write into it.
    return nn.Parameter(tensor.to(device, torch.float32, copy=True), requires_grad=False)


# What a quantizer is told


def view_layer(skeleton: Skeleton, module: nn.Module, index: int, skip: re.Pattern[str] | None) -> LayerView:
    """A loaded layer with the linears that are to be quantized: all but those whose full name `skip` finds.

    Raises:
        QuantizationError: if a weight is NaN or infinite.
    """
    name = layer_name(index)
    for own, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise QuantizationError(f"{name}.{own} has values that are NaN or infinite; the model is damaged")
    groups = (_group(skeleton, name, names, producer, skip) for names, producer in GROUPS)
    return LayerView(name, module, tuple(group for group in groups if group.names))


def view_head(head: Head) -> LayerView:
    """The last norm and the head, as a layer whose own name is empty."""
    return LayerView(HEAD, head, (LinearGroup((HEAD,), "norm"),))


def _group(
    skeleton: Skeleton, layer: str, names: Sequence[str], producer: str, skip: re.Pattern[str] | None
) -> LinearGroup:
    kept = tuple(name for name in names if not is_skipped(f"{layer}.{name}", skip))
    # A factor can move only if every reader of the tensor takes it in, and if the linear that makes it is rewritten.
    movable = len(kept) == len(names)
    if producer in _LINEAR_PRODUCERS:
        movable = movable and not is_skipped(f"{layer}.{producer}", skip)
    if not movable:
        return LinearGroup(kept)
    return LinearGroup(kept, producer, _value_channels(skeleton) if producer == "self_attn.v_proj" else None)


def is_skipped(name: str, skip: re.Pattern[str] | None) -> bool:
    """Whether a module stays dense."""
    return skip is not None and skip.search(name) is not None


def _value_channels(skeleton: Skeleton) -> torch.Tensor | None:
    """Which value makes each input of the output projection: heads of queries share those of keys and values."""
    config = skeleton.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads == kv_heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    head_of_input = torch.arange(heads) // (heads // kv_heads)
    channels: torch.Tensor = head_of_input.unsqueeze(1) * head_dim + torch.arange(head_dim)
    return channels.reshape(-1)


def full_name(view: LayerView, own: str) -> str:
    """A module or tensor of a view by its name in the checkpoint."""
    if view.name != HEAD:
        return f"{view.name}.{own}"
    return _NORM + own.removeprefix("norm") if own.startswith("norm") else own
