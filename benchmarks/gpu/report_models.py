"""Whole models as text: speeds with their distance to the memory's bound, serving, logits, and the aims."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.gpu.tables import Record, gib, share, table, verdict

#: Tokens per second of Llama-3-8B in 4 bits, one sequence, that are aimed at on an H100; peers publish 223 (GemLite,
#: groups of 64), 192 (Marlin in vLLM) and 280 (torchao) for the same card.
DECODE_8B = 260.0
#: Times the speed of our own 16-bit weights, at so many sequences.
RATIO_TO_16_BIT, RATIO_BATCH = 1.2, 32
#: The part of a recorded step that may pass outside kernels.
OUTSIDE = 0.15
#: Times the tokens per second of transformers.
SERVING_RATIO = 24.0
MODEL = "llama-3-8b"


def end_to_end_sections(records: Sequence[Record]) -> Iterator[str]:
    """A section per model and kind of weight."""
    for model, weights in dict.fromkeys((r["model"], r["weights"]) for r in records):
        mine = [r for r in records if (r["model"], r["weights"]) == (model, weights)]
        blocks = [f"## {model}, {weights}", *(_memory(r) for r in mine if r["what"] == "memory"), _decode(mine)]
        blocks += [_prefill_and_peak(mine)]
        yield "\n\n".join(block for block in blocks if block)


def _memory(record: Record) -> str:
    tokens = ", ".join(f"{kv['tokens']} in {name}" for name, kv in record["kv"].items())
    limit = record["memory_limit"]
    allowed = "" if limit is None else f" of the {gib(limit)} GiB allowed"
    return (
        f"{gib(record['weight_bytes'])} GiB of weights{allowed}, made and laid out in {record['load_seconds']:.0f} s. "
        f"Tokens that the KV cache holds, by format: {tokens}."
    )


def _decode(records: Sequence[Record]) -> str:
    decode = [r for r in records if r["what"] == "decode"]
    header = ["engine", "sequences", "tokens/s", "ms/step", "of memory bound", "outside kernels"]
    lines = []
    for r in decode:
        if r["status"] != "measured":
            lines.append([r["variant"], str(r["batch"]), f"left out: {r['why']}", "-", "-", "-"])
            continue
        figures = [f"{r['tokens_per_s']:.0f}", f"{r['step_seconds'] * 1e3:.2f}"]
        lines.append([r["variant"], str(r["batch"]), *figures, share(r["of_bound"]), share(_outside(records, r))])
    return table(header, lines, text=("engine",)) if lines else ""


def _outside(records: Sequence[Record], decode: Record) -> float | None:
    """The share of a decode step that the profiler found outside kernels."""
    keys = ("variant", "batch")
    same = (r for r in records if r["what"] == "profile" and all(r[key] == decode[key] for key in keys))
    return next((r["outside_kernels"] for r in same), None)


def _prefill_and_peak(records: Sequence[Record]) -> str:
    lines = [
        f"- {r['variant']}: a prompt of {r['prompt_tokens']} tokens at {r['tokens_per_s']:.0f} tokens/s"
        for r in records
        if r["what"] == "prefill"
    ]
    lines += [
        f"- {r['variant']}: at most {gib(r['peak_reserved'])} GiB reserved, {gib(r['card_used'])} GiB of the card used"
        for r in records
        if r["what"] == "peak"
    ]
    return "\n".join(lines)


def serving_section(records: Sequence[Record]) -> str:
    """Tokens per second of each contender."""
    header = ["contender", "requests timed", "seconds", "output tokens/s", "GiB at most"]
    lines = [
        [r["contender"], str(r.get("timed_requests", r["requests"])), f"{r['seconds']:.1f}",
         f"{r['tokens_per_s']:.0f}", gib(r["peak_reserved"])]
        for r in records
    ]  # fmt: skip
    if not lines:
        return ""
    first = records[0]
    title = f"## {first['requests']} requests at once, {first['model']}, {first['weights']}"
    note = (
        "transformers takes one request at a time, with the same weights in 16 bits; its rate over the requests timed "
        "stands for all of them."
    )
    return f"{title}\n\n{table(header, lines, text=('contender',))}\n\n{note}"


def logits_section(records: Sequence[Record]) -> str:
    """Errors of ours and of transformers in the same dtype, relative to the root mean square of the judge's logits."""
    header = ["model", "weights", "steps", "worst", "may be", "transformers", "mean", "may be", "transformers",
              "same top token", "transformers", ""]  # fmt: skip
    lines = [
        [r["model"], r["weights"], r["mode"], f"{r['max_error']:.1e}", f"{r['max_bound']:.1e}",
         f"{r['peer_max_error']:.1e}", f"{r['mean_error']:.1e}", f"{r['mean_bound']:.1e}",
         f"{r['peer_mean_error']:.1e}", f"{r['top1']:.1%}", f"{r['peer_top1']:.1%}",
         "ok" if r["passed"] else "TOO FAR"]
        for r in records
    ]  # fmt: skip
    if not lines:
        return ""
    return f"## Logits, {records[0]['dtype']}\n\n" + table(header, lines, text=("model", "weights", "steps", ""))


def target_lines(models: Sequence[Record], serving: Sequence[Record]) -> list[str]:
    """For each aim that has figures: the figure, and whether it is reached."""
    lines = []
    single, quarter, whole = (
        _rate(models, weights, batch)
        for weights, batch in (("4-bit", 1), ("4-bit", RATIO_BATCH), ("16-bit", RATIO_BATCH))
    )
    if single is not None:
        lines.append(f"{verdict(single >= DECODE_8B)}: {MODEL}, one sequence: {single:.0f} of {DECODE_8B:.0f} tokens/s")
    if quarter is not None and whole is not None:
        ratio = quarter / whole
        lines.append(
            f"{verdict(ratio >= RATIO_TO_16_BIT)}: {MODEL}, {RATIO_BATCH} sequences: {ratio:.2f} of {RATIO_TO_16_BIT} "
            "times the speed of 16-bit weights"
        )
    outside = [
        r["outside_kernels"]
        for r in models
        if r["what"] == "profile" and r["variant"] != "eager" and r["outside_kernels"] is not None
    ]
    if outside:
        reached = sum(value <= OUTSIDE for value in outside)
        lines.append(
            f"{verdict(reached == len(outside))}: at most {OUTSIDE:.0%} of a recorded step outside kernels on "
            f"{reached} of {len(outside)} problems; highest {max(outside):.0%}"
        )
    rates = {r["contender"]: r["tokens_per_s"] for r in serving}
    if {"qengine", "transformers"} <= rates.keys():
        ratio = rates["qengine"] / rates["transformers"]
        lines.append(
            f"{verdict(ratio >= SERVING_RATIO)}: serving: {ratio:.1f} of {SERVING_RATIO:.0f} times transformers"
        )
    return lines


def _rate(records: Sequence[Record], weights: str, batch: int) -> float | None:
    """Tokens per second of the 8B model with recorded steps and a 16-bit KV cache."""
    for r in records:
        is_it = r["model"] == MODEL and r["weights"].startswith(weights) and r["what"] == "decode"
        if is_it and r["variant"] == "graphs" and r["batch"] == batch and r["status"] == "measured":
            return float(r["tokens_per_s"])
    return None
