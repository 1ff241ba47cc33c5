"""The architectures that can be served. Adding one touches its spec, this list and its test; an alias is one line.

Invariant: an unknown architecture is refused with the list of known ones; ``auto_map`` is never followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qengine.errors import ConfigError
from qengine.models.llama import LLAMA
from qengine.models.mistral import MISTRAL
from qengine.models.qwen2 import QWEN2
from qengine.models.qwen3 import QWEN3
from qengine.models.spec import ModelSpec

SPECS: tuple[ModelSpec, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3)
_BY_ARCHITECTURE = {name: spec for spec in SPECS for name in spec.architectures}


def find_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """The spec for a config.json object.

    Raises:
        ConfigError: if its architecture is none of ours, with the list of those.
    """
    names = raw.get("architectures")
    names = names if isinstance(names, list) else []
    for name in names:
        spec = _BY_ARCHITECTURE.get(name) if isinstance(name, str) else None
        if spec is not None:
            return spec
    found = ", ".join(str(n)[:80] for n in names) or "none named"
    raise ConfigError(f"architecture not supported: {found}; supported: {', '.join(sorted(_BY_ARCHITECTURE))}")
