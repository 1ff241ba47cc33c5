"""The table of metrics in docs/metrics.md, made from the catalog.

python -m qengine.serving.metrics.table
"""

from __future__ import annotations

import sys

from qengine.config import CacheConfig
from qengine.engine import EngineInfo
from qengine.serving.metrics.catalog import EngineMetrics, HttpMetrics, ServerMetrics, build_info, cache_config_info
from qengine.serving.metrics.instruments import Instrument, InstrumentSet

_INFO = EngineInfo(
    model="m",
    architecture="",
    quantization=None,
    description="",
    dtype="",
    device="",
    max_model_len=1,
    hidden_size=0,
    vocab_size=1,
    block_size=1,
    num_blocks=1,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    weight_bytes=0,
    kv_cache_bytes=0,
)


def table() -> str:
    """Markdown, one line per metric: name without the prefix, kind, labels, meaning."""
    sets: tuple[InstrumentSet, ...] = (
        EngineMetrics("", "m", 1),
        cache_config_info("", _INFO, CacheConfig()),
        ServerMetrics(""),
        build_info("", dict.fromkeys(("version", "python", "architecture", "quantization", "dtype", "device"), "")),
        HttpMetrics(),
    )
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for instruments in sets:
        rows += [_row(instrument, instruments.common) for instrument in instruments]
    return "\n".join(rows) + "\n"


def _row(instrument: Instrument, common: dict[str, str]) -> str:
    name = instrument.name + ("_total" if instrument.kind == "counter" else "")
    labels = ", ".join(f"`{label}`" for label in (*common, *instrument.labels))
    return f"| `{name}` | {instrument.kind} | {labels} | {instrument.help} |"


if __name__ == "__main__":
    sys.stdout.write(table())
