"""What kind of quantized checkpoint a folder of safetensors is.

The declaration is looked for in ``config.json``, ``quantize_config.json``, ``quant_config.json`` and the headers'
metadata, in this order; without one the tensors' shapes tell. Invariant: whatever cannot be read exactly is refused
here, with the reason, before any weight is read. Where a declaration and the shapes differ, readers follow the shapes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from converters.checkpoint import Checkpoint
from converters.errors import CheckpointError
from converters.files import list_folder, read_json_object, shown
from converters.module_rules import MAX_RULES, DynamicRule, ModuleRules, Part, Pattern, require_short

logger = logging.getLogger(__name__)

SUPPORTED = (
    "GPTQ (2, 3, 4 or 8 bits, formats gptq and gptq_v2), AWQ (4 bits, version gemm), compressed-tensors (4 or 8 bits, "
    "format pack-quantized), GGUF (F32, F16, BF16, Q8_0, Q4_0, Q4_1) and unquantized safetensors"
)
GPTQ_BITS = (2, 3, 4, 8)
COMPRESSED_BITS = (4, 8)
_FILES = ("quantize_config.json", "quant_config.json")
_SYNONYMS = {
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "format": "checkpoint_format",
    "method": "quant_method",
}
#: What compressed-tensors calls its codes. Other programs use the name for other layouts, so a config must say it.
_PACKED = re.compile(r"\.weight_packed$")
#: Tensor names that betray a layout nobody here can read, whatever the config says.
_FOREIGN_LAYOUTS = (
    (_PACKED, "of packed weights that no config declares as compressed-tensors"),
    (re.compile(r"\.weight_scale_inv$"), "fp8 with block scales"),
    (re.compile(r"\.weight\.quant_state\.|\.weight\.absmax$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"_proj_blocks$"), "mxfp4"),
    (re.compile(r"_weight_qdata$"), "torchao"),
    (re.compile(r"\.scaled_zeros$"), "AWQ as llm-awq packs it"),
    (re.compile(r"_proj\.B$"), "GPTQ repacked for Marlin"),
)


#: Of a module that no rule is about.
_NO_RULE = DynamicRule("")


@dataclass(frozen=True, slots=True)
class ModuleScheme:
    """What the declaration says of one module."""

    bits: int | None
    group_size: int | None
    symmetric: bool
    skipped: bool


@dataclass(frozen=True, slots=True)
class QuantizationScheme:
    """A checkpoint's declared quantization.

    Attributes:
        method: which reader understands the tensors.
        checkpoint_format: "gptq" (zero points stored less one), "gptq_v2" (stored as they are), "gemm" (AWQ) or
            "pack-quantized" (compressed-tensors).
        bits: of a code, before overrides; None if not said.
        group_size: rows that share a scale, -1 for all rows of a layer; None if not said.
        symmetric: the zero point is 2 ** (bits - 1) everywhere.
        desc_act: declared activation order; the tensors decide.
        zero_point: AWQ's word for "not symmetric"; None if not said.
        quantizer: the program that wrote the file, e.g. "gptqmodel:7.7.0", or "".
        rules: overrides by module name, and which modules stay dense.
    """

    method: Literal["gptq", "awq", "compressed-tensors"]
    checkpoint_format: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    desc_act: bool = False
    zero_point: bool | None = None
    quantizer: str = ""
    rules: ModuleRules = field(default_factory=ModuleRules)

    @property
    def name(self) -> str:
        """The method as people write it."""
        return self.method if self.method == "compressed-tensors" else self.method.upper()

    @property
    def description(self) -> str:
        """One line for people."""
        name = self.name + (" v2" if self.checkpoint_format == "gptq_v2" else "")
        parts = [name if self.bits is None else f"{name} {self.bits}-bit"]
        if self.group_size is not None:
            parts.append("per channel" if self.group_size == -1 else f"group {self.group_size}")
        parts.append("symmetric" if self.symmetric else "asymmetric")
        return ", ".join(parts + ["act-order"] * self.desc_act)

    def for_module(self, name: str) -> ModuleScheme:
        """The declaration with the overrides for the (unfused) module `name` applied.

        Raises:
            CheckpointError: if the rules have taken too long for so many modules.
        """
        rule = self.rules.first(name) or _NO_RULE
        return ModuleScheme(
            bits=self.bits if rule.bits is None else rule.bits,
            group_size=self.group_size if rule.group_size is None else rule.group_size,
            symmetric=self.symmetric if rule.symmetric is None else rule.symmetric,
            skipped=rule.skip,
        )


@dataclass(frozen=True, slots=True)
class Declaration:
    """A quantization config as found, keys in lower case and synonyms resolved, and where it stood."""

    values: Mapping[str, Any]
    where: str

    @property
    def weight_file_stem(self) -> str | None:
        """AutoGPTQ's name of the weight file, without suffix."""
        stem = self.values.get("model_file_base_name")
        return stem if isinstance(stem, str) and stem else None


def find_declaration(folder: Path, config: Mapping[str, Any]) -> Declaration | None:
    """The quantization config of a folder: of config.json, else of the quantizer's own file.

    Raises:
        CheckpointError: if it is not an object, or its file is broken.
    """
    for key in ("quantization_config", "compression_config"):
        raw = config.get(key)
        if raw is None or raw == {}:
            continue
        where = f"{folder / 'config.json'}: {key}"
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where} is a {type(raw).__name__}, expected an object")
        values = _normalize(raw)
        if key == "compression_config":
            values.setdefault("quant_method", "compressed-tensors")
        return Declaration(values, where)
    present = list_folder(folder)
    for name in _FILES:
        if name in present:
            return Declaration(_normalize(read_json_object(folder / name)), str(folder / name))
    return None


def detect(checkpoint: Checkpoint, declaration: Declaration | None) -> QuantizationScheme | None:
    """The scheme of a checkpoint; None if nothing is quantized.

    Raises:
        CheckpointError: if it is quantized in a way that is not supported, with what is.
    """
    if declaration is None:
        declaration = _declaration_of_metadata(checkpoint)
    values = dict(declaration.values) if declaration else {}
    _refuse_foreign_tensors(checkpoint, values.get("quant_method"))
    where = declaration.where if declaration else str(checkpoint.path)
    if not values.get("quant_method"):
        guess = _method_by_shapes(checkpoint) or _method_by_keys(values)
        if guess is None:
            return None
        values["quant_method"] = guess
        if declaration is None:
            logger.warning("%s: no config says how the weights are quantized; read as %s", where, guess.upper())
    reader = _Reader(values, where)
    method = reader.text("quant_method")
    if method not in _METHODS:
        raise CheckpointError(_unsupported(where, f"'{shown(method)}'"))
    return _METHODS[method](reader)


def _unsupported(where: str, what: str) -> str:
    return f"{where}: quantization {what} is not supported. Supported: {SUPPORTED}"


def _normalize(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Lower-case keys; a synonym gives way to the proper name."""
    lower = {key.lower(): value for key, value in raw.items()}
    for synonym, key in _SYNONYMS.items():
        if lower.get(key) is None and synonym in lower:
            lower[key] = lower[synonym]
    return lower


# Reading values


class _Reader:
    """Typed access to a declaration; every complaint says where it stands."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {shown(repr(self.values.get(key)))}, expected {expected}")

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value.lower()

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def whole(self, key: str) -> int | None:
        value = self.values.get(key)
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value):
            return int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.fail(key, "a whole number")
        return value

    def bits(self, allowed: tuple[int, ...]) -> int | None:
        value = self.whole("bits")
        if value is not None and value not in allowed:
            raise self.fail("bits", f"one of {', '.join(map(str, allowed))}")
        return value

    def group_size(self) -> int | None:
        value = self.whole("group_size")
        if value is not None and value != -1 and not 1 <= value <= 2**31:
            raise self.fail("group_size", "-1 (one group) or a positive number")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > MAX_RULES or not all(isinstance(v, str) and v for v in value):
            raise self.fail(key, f"a list of names, at most {MAX_RULES}")
        return tuple(value)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


# GPTQ


def _gptq(reader: _Reader) -> QuantizationScheme:
    layout = reader.text("checkpoint_format", "gptq")
    # GPTQModel writes the layout under both names; neither may name one that cannot be read.
    named = [layout, reader.text("format", layout), *(["marlin"] if reader.flag("is_marlin_format") else [])]
    for name in named:
        if name not in ("gptq", "gptq_v2"):
            raise CheckpointError(
                _unsupported(reader.where, f"GPTQ in the layout '{shown(name)}'")
                + ". Use the original GPTQ checkpoint of this model"
            )
    if reader.text("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise reader.fail("pack_dtype", "int32")
    return QuantizationScheme(
        method="gptq",
        checkpoint_format=layout,
        bits=reader.bits(GPTQ_BITS),
        group_size=reader.group_size(),
        symmetric=_or(reader.flag("sym"), True),
        desc_act=bool(reader.flag("desc_act")),
        quantizer=_quantizer(reader.values),
        rules=ModuleRules(_dynamic(reader), f"{reader.where}: dynamic"),
    )


def _quantizer(values: Mapping[str, Any]) -> str:
    meta = values.get("meta")
    writer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(writer, list) and writer:
        writer = writer[0]
    return writer if isinstance(writer, str) else ""


def _dynamic(reader: _Reader) -> tuple[DynamicRule, ...]:
    raw = reader.values.get("dynamic")
    if raw is None:
        return ()
    if not isinstance(raw, dict) or len(raw) > MAX_RULES:
        raise reader.fail("dynamic", f"an object of patterns and overrides, at most {MAX_RULES}")
    require_short(raw, f"{reader.where}: dynamic")
    rules = []
    for key, overrides in raw.items():
        text = key[2:] if key.startswith(("+:", "-:")) else key
        pattern = Pattern.compile(text, f"{reader.where}: dynamic")
        if key.startswith("-:"):
            rules.append(DynamicRule(pattern, skip=True))
            continue
        if not isinstance(overrides, dict):
            raise CheckpointError(f"{reader.where}: dynamic['{shown(key)}'] is {shown(overrides)}, expected an object")
        rules.append(_override(pattern, overrides, f"{reader.where}: dynamic['{shown(key)}']"))
    return tuple(rules)


def _override(module: str | Pattern, overrides: Mapping[str, Any], where: str) -> DynamicRule:
    part = _Reader(_normalize(overrides), where)
    return DynamicRule(module, False, part.bits(GPTQ_BITS), part.group_size(), part.flag("sym"))


# AWQ and auto-round


def _awq(reader: _Reader) -> QuantizationScheme:
    version = reader.text("version") or reader.text("checkpoint_format", "gemm")
    if reader.text("backend", "autoawq") == "llm-awq":
        version = "llm-awq"
    # "exllama" names kernels; its tensors are those of gemm.
    if version not in ("gemm", "exllama"):
        raise CheckpointError(
            _unsupported(reader.where, f"AWQ in the version '{shown(version)}'")
            + ". Quantize the model again with version gemm, or find such a copy of it"
        )
    zero_point = reader.flag("zero_point")
    return QuantizationScheme(
        method="awq",
        checkpoint_format="gemm",
        bits=_or(reader.bits((4,)), 4),
        group_size=reader.group_size(),
        symmetric=zero_point is False,
        zero_point=zero_point,
        quantizer=_quantizer(reader.values),
        rules=_parts_to_skip(reader),
    )


def _parts_to_skip(reader: _Reader) -> ModuleRules:
    key = "modules_to_not_convert"
    return ModuleRules([DynamicRule(Part(text), skip=True) for text in reader.names(key)], f"{reader.where}: {key}")


def _auto_round(reader: _Reader) -> QuantizationScheme:
    """Tensors are GPTQ's or AWQ's. The zero points of its own GPTQ-like format are certain only if symmetric."""
    packing = reader.text("packing_format") or reader.text("backend", "auto_round")
    if "awq" in packing:
        scheme = _awq(_Reader({**reader.values, "version": "gemm", "backend": None}, reader.where))
    else:
        scheme = _gptq(_Reader({**reader.values, "checkpoint_format": "gptq"}, reader.where))
        if not scheme.symmetric and packing != "auto_round:auto_gptq":
            raise CheckpointError(_unsupported(reader.where, f"'auto-round' packed as '{shown(packing)}', asymmetric"))
    rules = (*scheme.rules.rules, *_extra_config(reader))
    return replace(scheme, rules=ModuleRules(rules, reader.where))


def _extra_config(reader: _Reader) -> tuple[DynamicRule, ...]:
    """auto-round's overrides, by exact module name."""
    raw = reader.values.get("extra_config")
    if raw is None:
        return ()
    if not isinstance(raw, dict) or len(raw) > MAX_RULES or not all(isinstance(v, dict) for v in raw.values()):
        raise reader.fail("extra_config", "an object of module names and overrides")
    rules = []
    for name, overrides in raw.items():
        where = f"{reader.where}: extra_config['{shown(name)}']"
        dense = _Reader(_normalize(overrides), where).whole("bits") in (16, 32)
        rules.append(DynamicRule(name, skip=True) if dense else _override(name, overrides, where))
    return tuple(rules)


# compressed-tensors


def _compressed_tensors(reader: _Reader) -> QuantizationScheme:
    """Rules in the order in which the library asks: ignored, then targets by exact name, by pattern, and by class."""
    layout = reader.text("checkpoint_format", "pack-quantized")
    if layout not in ("pack-quantized", "mixed-precision"):
        raise CheckpointError(_unsupported(reader.where, f"compressed-tensors in the format '{shown(layout)}'"))
    for key in ("sparsity_config", "transform_config"):
        value = reader.values.get(key)
        if isinstance(value, Mapping) and value and value.get("format") != "dense":
            raise CheckpointError(_unsupported(reader.where, f"compressed-tensors with a {key}"))
    groups = reader.values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) > MAX_RULES:
        raise reader.fail("config_groups", "an object of groups")
    where = f"{reader.where}: config_groups"
    schemes = [_compressed_group(group, f"{where}['{shown(name)}']", layout) for name, group in groups.items()]
    targets = [(target, scheme) for names, scheme in schemes for target in names]
    exact = [(t, s) for t, s in targets if "." in t and not t.startswith("re:")]
    patterns = [(t, s) for t, s in targets if t.startswith("re:")]
    ignored_names = reader.names("ignore")
    require_short((name for name in (*ignored_names, *(t for t, _ in patterns)) if name.startswith("re:")), where)
    base = next((s for t, s in targets if "." not in t and not t.startswith("re:")), None)
    ignored = [DynamicRule(_target(name, reader.where), skip=True) for name in ignored_names]
    found = [replace(scheme, module=_target(target, where)) for target, scheme in (*exact, *patterns)]
    usual = base or (schemes[0][1] if schemes else _NO_RULE)
    return QuantizationScheme(
        method="compressed-tensors",
        checkpoint_format="pack-quantized",
        bits=usual.bits,
        group_size=usual.group_size,
        symmetric=_or(usual.symmetric, True),
        desc_act=any(_has_order(group) for group in groups.values()),
        quantizer=_quantizer(reader.values),
        rules=ModuleRules((*ignored, *found), reader.where),
    )


def _compressed_group(group: Any, where: str, layout: str) -> tuple[tuple[str, ...], DynamicRule]:
    """What a group targets, and a rule (whose module is not set yet) of what it says."""
    preset = isinstance(group, list)
    if not isinstance(group, dict):
        hint = "; presets by name are not read" if preset else ""
        raise CheckpointError(f"{where} is a {type(group).__name__}, expected an object with targets and weights{hint}")
    part = _Reader(group, where)
    own = part.text("format", "pack-quantized" if layout == "pack-quantized" else "")
    if own != "pack-quantized":
        raise CheckpointError(_unsupported(where, f"compressed-tensors in the format '{shown(own)}'"))
    if group.get("input_activations") is not None:
        raise CheckpointError(_unsupported(where, "compressed-tensors with quantized activations"))
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise part.fail("weights", "an object")
    numbers = _Reader({**weights, "bits": weights.get("num_bits")}, f"{where}: weights")
    if numbers.text("type", "int") != "int":
        raise CheckpointError(_unsupported(where, f"compressed-tensors of type '{shown(weights['type'])}'"))
    size = numbers.group_size()
    strategy = numbers.text("strategy") or ("group" if size is not None and size > 0 else "channel")
    if strategy not in ("group", "channel"):
        raise CheckpointError(_unsupported(where, f"compressed-tensors with the strategy '{shown(strategy)}'"))
    return part.names("targets"), DynamicRule(
        "",
        bits=numbers.bits(COMPRESSED_BITS),
        group_size=size if strategy == "group" else -1,
        symmetric=_or(numbers.flag("symmetric"), True),
    )


def _has_order(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, dict) else None
    return isinstance(weights, dict) and weights.get("actorder") in ("group", "dynamic", True)


def _target(name: str, where: str) -> str | Pattern:
    """ "re:" begins a pattern that matches from the start; anything else is a module's whole name."""
    return Pattern.compile(name[3:], where) if name.startswith("re:") else name


_METHODS: Mapping[str, Callable[[_Reader], QuantizationScheme]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
}


# Without a declaration


def _refuse_foreign_tensors(checkpoint: Checkpoint, method: object) -> None:
    own = _PACKED if method == "compressed-tensors" else None
    for name in checkpoint.tensors:
        for pattern, what in _FOREIGN_LAYOUTS:
            if pattern is not own and pattern.search(name):
                raise CheckpointError(_unsupported(f"{checkpoint.path}, tensor {shown(name)}", what))


def _declaration_of_metadata(checkpoint: Checkpoint) -> Declaration | None:
    """AutoGPTQ repeats its config in the header, as strings."""
    prefix = "gptq_"
    values = {k[len(prefix) :]: v for k, v in checkpoint.metadata.items() if k.lower().startswith(prefix)}
    if "bits" not in values:
        return None
    return Declaration({"quant_method": "gptq", **_normalize(values)}, f"{checkpoint.path}, header metadata")


def _method_by_shapes(checkpoint: Checkpoint) -> str | None:
    """GPTQ packs along the inputs, so that words and scales have equally many columns; AWQ packs along the outputs."""
    for name, words in checkpoint.tensors.items():
        scales = checkpoint.tensors.get(name.removesuffix("qweight") + "scales")
        if not name.endswith(".qweight") or scales is None or len(words.shape) != 2 or len(scales.shape) != 2:
            continue
        if words.shape[1] == scales.shape[1]:
            return "gptq"
        if words.shape[1] * 8 == scales.shape[1]:
            return "awq"
        raise CheckpointError(
            f"{checkpoint.path}: {shown(name)} is {words} and its scales are {scales}, which is neither GPTQ nor AWQ "
            f"(gemm), and no config says what it is. Supported: {SUPPORTED}"
        )
    return None


def _method_by_keys(values: Mapping[str, Any]) -> str | None:
    if "zero_point" in values or "version" in values:
        return "awq"
    return "gptq" if "bits" in values else None
