"""Attention by itself as text: decode as a share of the copy bandwidth, prompts against torch's own, and the aims."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.gpu.tables import Record, share, table, verdict

OWN, PEER = "qengine", "torch"
#: Decode reads at least so much of what a copy moves, from so many cached tokens of all sequences on.
DECODE_SHARE, DECODE_TOKENS = 0.6, 8192
#: Prompts run at least so fast, relative to torch.
PROMPT_RATIO = 0.5


def sections(records: Sequence[Record]) -> Iterator[str]:
    """Decode, prompts, and results that are wrong."""
    own = [r for r in records if r["contender"] == OWN and r["status"] == "measured"]
    decode, others = ([r for r in own if (r["kind"] == "decode") == wanted] for wanted in (True, False))
    if decode:
        header = ["KV cache", "sequences", "context", "us", "GB/s", "of copy", "vs torch, fp16"]
        lines = [
            [r["format"], str(r["batch"]), str(r["context"]), f"{r['us']:.1f}", f"{_rate(r) / 1e9:.0f}",
             share(_rate(r), r.get("copy_bytes_per_s")), _ratio_text(r, records)]
            for r in decode
        ]  # fmt: skip
        yield "## Attention, decode\n\n" + table(header, lines, text=("KV cache",))
    if others:
        header = ["step", "KV cache", "tile", "us", "TFLOPS", "vs torch, fp16"]
        lines = [
            [r["kind"], r["format"], r["tile"], f"{r['us']:.1f}", f"{r['flop'] / r['us'] / 1e6:.1f}",
             _ratio_text(r, records)]
            for r in others
        ]  # fmt: skip
        yield "## Attention, prompts\n\n" + table(header, lines, text=("step", "KV cache", "tile"))
    wrong = [r for r in own if not r["error"] <= r["error_bound"]]
    yield "\n".join(f"- WRONG RESULT: {_name(r)}: error {r['error']:.1e}" for r in wrong)


def target_lines(records: Sequence[Record]) -> list[str]:
    """For each aim that has figures: how many problems reach it, and the furthest from it."""
    lines = []
    decode = [
        (_rate(r) / r["copy_bytes_per_s"], r)
        for r in records
        if r["contender"] == OWN and r["status"] == "measured" and r["kind"] == "decode" and r.get("copy_bytes_per_s")
        if r["batch"] * r["context"] >= DECODE_TOKENS
    ]
    if decode:
        worst, where = min(decode, key=lambda item: item[0])
        reached = sum(value >= DECODE_SHARE for value, _ in decode)
        lines.append(
            f"{verdict(reached == len(decode))}: attention, decode from {DECODE_TOKENS} tokens on: {DECODE_SHARE:.0%} "
            f"of copy bandwidth on {reached} of {len(decode)} problems; lowest {worst:.0%} ({_name(where)})"
        )
    own = [r for r in records if r["contender"] == OWN and r["status"] == "measured" and r["kind"] != "decode"]
    prompts = [(ratio, r) for r in own if (ratio := ratio_to_torch(r, records)) is not None]
    if prompts:
        worst, where = min(prompts, key=lambda item: item[0])
        reached = sum(value >= PROMPT_RATIO for value, _ in prompts)
        lines.append(
            f"{verdict(reached == len(prompts))}: attention, prompts: {PROMPT_RATIO:.0%} of torch's speed on {reached} "
            f"of {len(prompts)} problems; lowest {worst:.0%} ({_name(where)})"
        )
    return lines


def ratio_to_torch(own: Record, records: Sequence[Record]) -> float | None:
    """How many times faster ours is than torch on the same step in float16, whatever format ours reads."""
    keys = ("kind", "batch", "context", "rows")
    for other in records:
        is_same = all(other[key] == own[key] for key in keys)
        if other["contender"] == PEER and other["status"] == "measured" and is_same:
            return float(other["us"] / own["us"])
    return None


def notes(records: Sequence[Record]) -> list[str]:
    """Why contenders are missing."""
    missing = (r for r in records if r["status"] != "measured")
    return list(dict.fromkeys(f"attention, {r['contender']}, {_name(r)}: {r['why']}" for r in missing))


def _ratio_text(own: Record, records: Sequence[Record]) -> str:
    ratio = ratio_to_torch(own, records)
    return "-" if ratio is None else f"{ratio:.2f}x"


def _rate(record: Record) -> float:
    return float(record["bytes"] / (record["us"] * 1e-6))


def _name(record: Record) -> str:
    return f"{record['kind']}, {record['format']}, {record['batch']} x {record['context']}"
