"""Which quantization a checkpoint has: from its configuration, then from the tensors it holds.

Invariant: the result is a `QuantizationScheme` that a reader of `formats/` handles, None for a plain checkpoint, or a
CheckpointError that says what the file is and what is supported. Tensor shapes have the last word on bits and groups
(see `formats.gptq`); this module reads no tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.json_files import read_json_object

GPTQ, AWQ, GGUF = "gptq", "awq", "gguf"
SUPPORTED = "GPTQ (2, 3, 4, 8 bits), AWQ GEMM (4 bits), GGUF (Q4_0, Q4_1, Q8_0, F16, BF16, F32) and plain safetensors"
SYNONYMS = {"awq": AWQ, "awq_marlin": AWQ, "gptq": GPTQ, "gptq_marlin": GPTQ, "gguf": GGUF}
_METHODS = {"gptq": GPTQ, "awq": AWQ}
_AUTO_ROUND = ("auto-round", "intel/auto-round")
_GPTQ_LAYOUTS = ("gptq", "gptq_v2")
#: exllama is a choice of kernel; the tensors are GEMM's.
_AWQ_LAYOUTS = ("gemm", "exllama")
_BIT_KEYS = ("bits", "w_bit", "wbits")
_GROUP_KEYS = ("group_size", "q_group_size")


@dataclass(frozen=True, slots=True)
class DynamicRule:
    """One entry of GPTQ's ``dynamic``: module names that match `pattern` from their start are skipped or overridden."""

    pattern: re.Pattern[str]
    skip: bool
    overrides: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QuantizationScheme:
    """How a checkpoint says it was quantized.

    Attributes:
        group_size: rows that share a scale, -1 for all.
        sym: the zero point is the constant 2^(bits-1).
        is_v2: GPTQ zero points are stored as they are; else less one.
        whole_word_zeros: v1 zero points were made by subtracting from whole words (GPTQModel), not field by field.
        skipped: AWQ's modules_to_not_convert, substrings of module names.
    """

    method: str
    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    is_v2: bool = False
    whole_word_zeros: bool = False
    dynamic: tuple[DynamicRule, ...] = ()
    skipped: tuple[str, ...] = ()

    def for_module(self, name: str) -> QuantizationScheme | None:
        """The scheme of one module after ``dynamic`` and skips; None if it should not be quantized."""
        if any(part in name for part in self.skipped):
            return None
        for rule in self.dynamic:
            if rule.pattern.match(name):
                return None if rule.skip else _override(self, rule.overrides)
        return self

    @property
    def summary(self) -> str:
        """One line for people."""
        group = "one group per column" if self.group_size == -1 else f"group {self.group_size}"
        kind = "symmetric" if self.sym else "asymmetric"
        parts = [f"{self.method.upper()} {self.bits}-bit", group]
        parts += [kind] if self.method == GPTQ else []
        parts += ["act-order"] if self.desc_act else []
        parts += [f"{len(self.dynamic)} dynamic rules"] if self.dynamic else []
        return ", ".join(parts)


def find_config(folder: Path, model_config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The quantization configuration: in config.json, else in a file of its own, else in the safetensors metadata."""
    declared = model_config.get("quantization_config") or model_config.get("compression_config")
    if declared is not None and not isinstance(declared, dict):
        raise CheckpointError(f"{folder}/config.json: quantization_config is {type(declared).__name__}, not an object")
    if declared:
        return _lower(declared)
    for name, method in (("quantize_config.json", GPTQ), ("quant_config.json", None)):
        if (folder / name).is_file():
            found = _lower(read_json_object(folder / name))
            # AutoAWQ's own file does not name its method; its keys do.
            method = method or (AWQ if "version" in found or "w_bit" in found else GPTQ)
            return {"quant_method": method, **found}
    if "gptq_bits" in metadata:
        return {"quant_method": GPTQ, **{k[5:]: _plain(v) for k, v in metadata.items() if k.startswith("gptq_")}}
    return None


def _lower(config: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).lower(): value for key, value in config.items()}


def _plain(text: str) -> Any:
    """A value that was written as a string: 'True', '-1', or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def detect(config: Mapping[str, Any] | None, tensor_names: Iterable[str], where: str) -> QuantizationScheme | None:
    """The scheme of a safetensors checkpoint, or None if nothing in it is quantized.

    Raises:
        CheckpointError: for a method, layout or number of bits that is not supported.
    """
    if config is None:
        if any(name.endswith(".qweight") for name in tensor_names):
            raise CheckpointError(
                f"{where}: has quantized tensors (qweight) but no quantization_config in config.json, "
                "quantize_config.json or quant_config.json; copy the file that belongs to it"
            )
        return None
    method = _method(config, where)
    return _gptq(config, where) if method == GPTQ else _awq(config, where)


def _method(config: Mapping[str, Any], where: str) -> str:
    named = config.get("quant_method") or config.get("method") or GPTQ
    method = str(named).lower()
    if method in _AUTO_ROUND:
        packing = str(config.get("packing_format", "")).lower()
        if "awq" in packing:
            return AWQ
        if "gptq" in packing and "gptq:" not in packing:
            return GPTQ
        raise CheckpointError(f"{where}: auto-round packing '{packing}' is not supported; supported: {SUPPORTED}")
    if method not in _METHODS:
        raise CheckpointError(f"{where}: quantization method '{method[:60]}' is not supported; supported: {SUPPORTED}")
    return _METHODS[method]


def _first(config: Mapping[str, Any], keys: Sequence[str], default: Any) -> Any:
    return next((config[k] for k in keys if config.get(k) is not None), default)


def _bits(config: Mapping[str, Any], allowed: Sequence[int], where: str, default: int = 4) -> int:
    bits = _first(config, _BIT_KEYS, default)
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
        raise CheckpointError(f"{where}: quantized to {bits!r} bits, supported are {', '.join(map(str, allowed))}")
    return bits


def _group_size(config: Mapping[str, Any], where: str, default: int) -> int:
    group = _first(config, _GROUP_KEYS, default)
    if isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1):
        raise CheckpointError(f"{where}: group_size is {group!r}, expected a whole number above 0, or -1 for one group")
    return group


def _flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected true or false")
    return value


def _gptq(config: Mapping[str, Any], where: str) -> QuantizationScheme:
    layout = str(_first(config, ("checkpoint_format", "format"), "gptq")).lower()
    if config.get("is_marlin_format") or layout not in _GPTQ_LAYOUTS:
        layout = "marlin" if config.get("is_marlin_format") else layout
        raise CheckpointError(
            f"{where}: GPTQ weights in the layout '{layout[:40]}', which is made for one kernel; "
            f"supported layouts: {', '.join(_GPTQ_LAYOUTS)}. Use the original GPTQ checkpoint of this model"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"{where}: packed in {config['pack_dtype']}, only int32 is supported")
    meta = config.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    writer = str((writers[0] if isinstance(writers, list) and writers else writers) or "")
    return QuantizationScheme(
        method=GPTQ,
        bits=_bits(config, (2, 3, 4, 8), where),
        group_size=_group_size(config, where, default=-1),
        sym=_flag(config, "sym", True, where),
        desc_act=_flag(config, "desc_act", False, where),
        is_v2=layout == "gptq_v2",
        whole_word_zeros=writer.startswith("gptqmodel"),
        dynamic=_dynamic(config.get("dynamic"), where),
    )


def _dynamic(rules: object, where: str) -> tuple[DynamicRule, ...]:
    if rules is None:
        return ()
    if not isinstance(rules, dict) or len(rules) > 10_000:
        raise CheckpointError(f"{where}: 'dynamic' must be an object of patterns and overrides")
    parsed = []
    for key, overrides in rules.items():
        pattern = key[2:] if key[:2] in ("+:", "-:") else key
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{where}: 'dynamic' has the invalid pattern '{key[:100]}': {error}") from error
        parsed.append(DynamicRule(compiled, key.startswith("-:"), overrides if isinstance(overrides, dict) else {}))
    return tuple(parsed)


def _override(scheme: QuantizationScheme, overrides: Mapping[str, Any]) -> QuantizationScheme:
    where = "dynamic"
    return replace(
        scheme,
        bits=_bits(overrides, (2, 3, 4, 8), where, default=scheme.bits),
        group_size=_group_size(overrides, where, default=scheme.group_size),
        sym=_flag(overrides, "sym", scheme.sym, where),
        desc_act=_flag(overrides, "desc_act", scheme.desc_act, where),
    )


def _awq(config: Mapping[str, Any], where: str) -> QuantizationScheme:
    version = str(config.get("version") or "gemm").lower()
    if version not in _AWQ_LAYOUTS or str(config.get("backend") or "").lower() == "llm-awq":
        version = "llm-awq" if version in _AWQ_LAYOUTS else version
        raise CheckpointError(
            f"{where}: AWQ weights in the layout '{version[:40]}'; supported is GEMM, which most published "
            "AWQ checkpoints use"
        )
    skipped = config.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) and name for name in skipped):
        raise CheckpointError(f"{where}: modules_to_not_convert must be a list of names")
    return QuantizationScheme(
        method=AWQ,
        bits=_bits(config, (4,), where),
        group_size=_group_size(config, where, default=128),
        sym=False,
        skipped=tuple(skipped),
    )


def check_requested(requested: str | None, found: str | None, where: str) -> None:
    """Refuse a requested quantization that is not the file's.

    Raises:
        CheckpointError: saying what was asked for and what the file is.
    """
    if requested is None:
        return
    wanted = SYNONYMS.get(requested)
    if wanted is None:
        raise CheckpointError(f"quantization '{requested}' is not known; known: {', '.join(SYNONYMS)}")
    if wanted != found:
        actual = f"a {found.upper()} checkpoint" if found else "not quantized"
        raise CheckpointError(
            f"{where} is {actual}, but quantization '{requested}' was asked for; "
            "leave the option out (the format is read from the file) or give another checkpoint"
        )
