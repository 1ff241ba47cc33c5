"""The files of an exported checkpoint beside its weights: configs, tokenizer, generation config and model card.

A folder's own files are copied as they are; a GGUF file's metadata becomes the files that transformers reads.
Invariant: nothing is made up: what the source does not say is not written. Nor is what lies outside the folder: a link
out of it is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.export_folder import PROJECT, OutputFolder, replace_text
from converters.export_tensors import ExportScheme
from converters.files import is_inside, shown
from converters.gguf_source import GGUFSource
from converters.gguf_tokenizer import read_tokenizer
from converters.skeleton import HEAD

PROJECT_VERSION = version(PROJECT)
#: What is copied of a folder: text and tokenizers, never code and never other weights.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
#: The folder in which transformers saves chat templates that have names.
_TEMPLATES = "additional_chat_templates"
_RUN = "```console\n$ qengine serve PATH\n```"
_LICENSES = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY)([._-].*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Producer:
    """Who made a checkpoint, and how: written into configs, headers, manifest and card.

    Attributes:
        version: of the project.
        made_from: name of the model, not a path.
        method: e.g. "gptq", "rtn", or "convert".
        details: further facts in order, by name; strings, numbers, or lists of them.
    """

    version: str
    made_from: str
    method: str
    details: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As other programs write it."""
        return f"{PROJECT}:{self.version}"

    def header(self) -> dict[str, str]:
        """Metadata of safetensors files; "format" is what transformers asks for."""
        about = {"method": self.method, "made_from": self.made_from, **self.details}
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        return {"format": "pt", "producer": self.name, **text}

    def entries(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "producer": self.name,
            "made_from": self.made_from,
            "method": self.method,
            "details": dict(self.details),
        }


def quantization_config(
    scheme: ExportScheme, dense: Sequence[str], producer: Producer, *, head_is_quantized: bool = False
) -> dict[str, Any]:
    """``quantization_config`` of config.json.

    Args:
        dense: module names of linears that stay as they are.
    """
    writer = {"awq": _awq_config, "gptq": _gptq_config, "compressed-tensors": _compressed_config}[scheme.format]
    others = [name for name in dense if name != HEAD]
    return writer(scheme, others, producer, head_is_quantized)


def _awq_config(scheme: ExportScheme, dense: Sequence[str], producer: Producer, head: bool) -> dict[str, Any]:
    # Names match as parts of module names; the head has to be named for transformers.
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*dense, *([] if head else [HEAD])],
    }


def _gptq_config(scheme: ExportScheme, dense: Sequence[str], producer: Producer, head: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": scheme.has_order,
        "sym": scheme.symmetric,
        "lm_head": head,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [producer.name], "method": producer.method, **producer.details},
    }
    if dense:
        config["dynamic"] = {f"-:{re.escape(name)}$": {} for name in dense}
    return config


def _compressed_config(scheme: ExportScheme, dense: Sequence[str], producer: Producer, head: bool) -> dict[str, Any]:
    is_channel = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if is_channel else "group",
        "group_size": None if is_channel else scheme.group_size,
        "actorder": "group" if scheme.has_order else None,
        "dynamic": False,
        "block_structure": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*dense, *([] if head else [HEAD])],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def write_configs(folder: OutputFolder, config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> None:
    """config.json, and for GPTQ the file in which some programs look first. Raises WriteError."""
    whole = dict(config)
    if quantization is not None:
        whole["quantization_config"] = dict(quantization)
    folder.write_json("config.json", whole)
    if quantization is not None and quantization["quant_method"] == "gptq":
        folder.write_json("quantize_config.json", dict(quantization))


def write_companions(folder: OutputFolder, source: object, path: Path) -> None:
    """Tokenizer, chat template, generation config and license.

    Args:
        source: what was opened at `path`; a GGUF file's metadata are taken from it.

    Raises:
        WriteError: if the disk is full.
        CheckpointError: if the tokenizer of a GGUF file is broken, or a file is a link out of the folder.
    """
    if isinstance(source, GGUFSource):
        _write_gguf_companions(folder, source.metadata)
        return
    for name, file in find_companions(path).items():
        folder.copy(file, name)


def check_companions(source: object, path: Path) -> None:
    """Refuse at once what `write_companions` would, hours later. Raises CheckpointError."""
    if not isinstance(source, GGUFSource):
        find_companions(path)


def find_companions(path: Path) -> dict[str, Path]:
    """The files of a folder that are copied, by their names there.

    Raises:
        CheckpointError: if one is a link out of the folder: what is exported is published, and a stranger's folder
            could name any file of the user's.
    """
    found = {
        file.name: file
        for file in sorted(path.iterdir())
        if (file.name in _COPIED or _LICENSES.fullmatch(file.name)) and os.path.isfile(file)
    }
    templates = {f"{_TEMPLATES}/{file.name}": file for file in sorted((path / _TEMPLATES).glob("*.jinja"))}
    found |= {name: file for name, file in templates.items() if os.path.isfile(file)}
    for name, file in found.items():
        if not is_inside(file) or (file.parent != path and not is_inside(file.parent)):
            raise CheckpointError(
                f"{path / name} is a link to a file outside the folder, {shown(os.path.realpath(file))}; put the file "
                "itself there, or remove the link"
            )
    return found


def _write_gguf_companions(folder: OutputFolder, metadata: Mapping[str, Any]) -> None:
    if "tokenizer.ggml.model" not in metadata:
        return
    found = read_tokenizer(metadata)
    folder.write_text("tokenizer.json", found.backend.to_str(pretty=False))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **found.special_tokens,
    }
    templates = found.named_chat_templates
    if isinstance(found.chat_template, str) and not templates:
        folder.write_text("chat_template.jinja", found.chat_template)
    elif isinstance(found.chat_template, str):
        named = {"default": found.chat_template, **templates}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    folder.write_json("tokenizer_config.json", config)
    eos = sorted(found.eos_token_ids)
    generation: dict[str, Any] = {"eos_token_id": eos[0] if len(eos) == 1 else eos} if eos else {}
    bos = found.special_tokens.get("bos_token")
    if bos is not None:
        generation["bos_token_id"] = found.backend.token_to_id(bos)
    if generation:
        folder.write_json("generation_config.json", generation)


CARD = "README.md"


def add_section(out: Path, section: str) -> None:
    """Put a section before the last part of a finished checkpoint's card. Raises WriteError."""
    replace_text(out, CARD, lambda text: text.replace(_RUN, f"{section.strip()}\n\n{_RUN}", 1))


def model_card(producer: Producer, scheme: ExportScheme | None, num_bytes: int, sections: Sequence[str] = ()) -> str:
    """README.md: what this is, how it was made, how it is run."""
    if scheme is None:
        title, kind = f"{producer.made_from}, unquantized", "unquantized safetensors"
    else:
        title = f"{producer.made_from}, {scheme.bits}-bit {scheme.format}"
        group = "one group per output" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
        order = ", in activation order" if scheme.has_order else ""
        kind = f"{scheme.format}, {scheme.bits} bits, {group}, {'' if scheme.symmetric else 'a'}symmetric{order}"
    rows = {"Made from": producer.made_from, "Method": producer.method, "Format": kind, "Made by": producer.name}
    rows |= {name.replace("_", " ").capitalize(): value for name, value in producer.details.items()}
    rows["Weights"] = f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
    table = [f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in rows.items()]
    parts = [f"# {title}", "\n".join(["| | |", "| --- | --- |", *table]), *sections, _RUN]
    hashes = "`manifest.json` has the SHA-256 of every file. The license is that of the original model."
    return "\n\n".join([*parts, hashes]) + "\n"
