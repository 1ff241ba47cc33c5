"""Conversion between formats without quantizing again: what a weight means stays the same, bit for bit.

AWQ, GPTQ, compressed-tensors and GGUF files become AWQ, GPTQ or compressed-tensors where those can express them, and
anything becomes dense, rounded once to the type that is written. Invariant: what cannot be expressed is refused with
the reason before anything is written. Memory: the weights of one output file, and one linear.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from converters.errors import CheckpointError
from converters.export_files import (
    CARD,
    PROJECT_VERSION,
    Producer,
    check_companions,
    model_card,
    quantization_config,
    write_companions,
    write_configs,
)
from converters.export_folder import OutputFolder, discarding, require_space
from converters.export_formats import ExportFormat
from converters.export_shards import ShardWriter
from converters.export_tensors import (
    ExportScheme,
    LinearTraits,
    cast,
    joined,
    linear_tensors,
    obstacle,
    scheme_of,
)
from converters.open import open_checkpoint
from converters.quantize_fit import dense_dtype
from converters.quantize_identity import model_name
from converters.skeleton import HEAD, OpenedModel
from converters.source import LinearSlot, Slot, TensorSlot, WeightSource
from quant_kernels.packed_weight import DenseWeight

#: Of an output file, and so of the memory for it.
MAX_SHARD_BYTES = 2 * 2**30
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written.

    Attributes:
        num_packed, num_dense: linears of either kind.
        num_bytes: of weights.
    """

    out: Path
    description: str
    num_packed: int
    num_dense: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Plan:
    scheme: ExportScheme | None
    packed: tuple[str, ...]
    dense: tuple[str, ...]
    dtype: torch.dtype | None


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: ExportFormat,
    *,
    name: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    show_progress: bool = False,
) -> Converted:
    """Write a checkpoint in another format.

    Args:
        model: a folder of safetensors, or a GGUF file.
        out: the folder to write, which must not exist.
        name: of the model, for the card; None takes the path's last part.
        dtype: "float16" or "bfloat16", of what is not quantized; None keeps it (and takes the config's type for what
            is expanded; bfloat16 for float32 in "dense").

    Raises:
        CheckpointError: if the model cannot be read, or the format cannot express it.
        WriteError: if the disk is full or read-only; nothing is left behind.
    """
    path, target = Path(model), Path(out)
    source = open_checkpoint(path)
    check_companions(source, path)
    opened = OpenedModel.check(source)
    chosen = _DTYPES[dtype] if dtype else None
    plan = _plan(source, opened, format, chosen, show_progress)
    producer = Producer(PROJECT_VERSION, name or model_name(path), "convert", {"source_format": source.description})
    config = opened.skeleton.exported_config(source.config, source.path)
    if plan.dtype is not None and (chosen is not None or format == "dense"):
        config["torch_dtype"] = str(plan.dtype).removeprefix("torch.")
        config.pop("dtype", None)
    with discarding(OutputFolder.create(target, source=path, resume=None)) as folder:
        require_space(folder.out, _estimate(opened, plan))
        shards = ShardWriter(folder, max_shard_bytes, producer.header())
        for slot in _with_progress(opened, "Converting", show_progress):
            shards.add(_tensors(source, slot, plan))
        shards.finish()
        quantization = None
        if plan.scheme is not None:
            is_head = HEAD in plan.packed
            quantization = quantization_config(plan.scheme, plan.dense, producer, head_is_quantized=is_head)
        write_configs(folder, config, quantization)
        write_companions(folder, source, path)
        folder.write_text(CARD, model_card(producer, plan.scheme, shards.num_bytes))
        folder.finish(producer.entries())
    description = "dense" if plan.scheme is None else f"{plan.scheme.format} {plan.scheme.bits}-bit"
    return Converted(folder.out, description, len(plan.packed), len(plan.dense), shards.num_bytes)


def _plan(
    source: WeightSource, opened: OpenedModel, format: ExportFormat, dtype: torch.dtype | None, show_progress: bool
) -> _Plan:
    """Look at every quantized linear; the data decide, as zero points and scales may be such that a format has none."""
    linears = [slot for slot in opened.skeleton.slots(tied=opened.tied) if isinstance(slot, LinearSlot)]
    names = tuple(slot.name for slot in linears)
    if format == "dense":
        return _Plan(None, (), names, dtype or _narrowed(source.config))
    traits: list[LinearTraits] = []
    reasons: list[tuple[str, str]] = []
    for slot in tqdm(linears, "Checking", unit=" linears", disable=not show_progress, leave=False):
        if source.linear_kind(slot).is_dense:
            continue
        weight = source.read_linear(slot)
        if isinstance(weight, DenseWeight):
            continue
        reason = obstacle(weight, format)
        if reason is None and slot.name == HEAD and format == "awq":
            reason = "AWQ has no place for a quantized head"
        if reason is None:
            traits.append(LinearTraits.of(slot.name, weight))
        else:
            reasons.append((slot.name, reason))
    if reasons:
        raise CheckpointError(
            f"{source.path} ({source.description}) cannot be written as {format} without quantizing it again. "
            f"{joined(reasons)}. To quantize it again: qengine quantize"
        )
    if not traits:
        raise CheckpointError(
            f"{source.path} ({source.description}) has no linear to write as {format}; quantize it: qengine quantize"
        )
    scheme = scheme_of(traits, format)
    if isinstance(scheme, str):
        raise CheckpointError(f"{source.path} cannot be written as {format}: {scheme}")
    packed = tuple(trait.name for trait in traits)
    # The tables of a GGUF file are expanded to float32, which their config does not mean.
    kept = dtype or (dense_dtype(source.config) if source.quantization == "gguf" else None)
    return _Plan(scheme, packed, tuple(name for name in names if name not in set(packed)), kept)


def _narrowed(config: Mapping[str, Any]) -> torch.dtype:
    """The type of a dense checkpoint: the config's if it has 16 bits; of float32 the one with the same range."""
    said = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if said == "float32" else dense_dtype(config)


def _tensors(source: WeightSource, slot: Slot, plan: _Plan) -> dict[str, torch.Tensor]:
    if isinstance(slot, TensorSlot):
        return {slot.name: cast(slot.name, source.read_tensor(slot), plan.dtype)}
    scheme = plan.scheme if slot.name in plan.packed else None
    return linear_tensors(slot.name, source.read_linear(slot), scheme, plan.dtype)


def _estimate(opened: OpenedModel, plan: _Plan) -> int:
    """Bytes of the weights, about: two for a number that is not quantized, and the codes with their scales."""
    total = 0.0
    packed = set(plan.packed)
    for slot in opened.skeleton.slots(tied=opened.tied):
        if isinstance(slot, TensorSlot):
            total += 2 * torch.Size(slot.shape).numel()
        elif plan.scheme is None or slot.name not in packed:
            total += 2 * slot.in_features * slot.out_features
        else:
            size = slot.in_features if plan.scheme.group_size == -1 else plan.scheme.group_size
            total += slot.in_features * slot.out_features * (plan.scheme.bits / 8 + 2.5 / size)
    return int(total)


def _with_progress(opened: OpenedModel, title: str, shown: bool) -> Iterator[Slot]:
    slots = opened.skeleton.slots(tied=opened.tied)
    return iter(tqdm(slots, title, unit=" tensors", disable=not shown, leave=False))
