"""What the CPU's int8 activations cost in quality: `python -m benchmarks.cpu_quality`.

The next token's distribution at every place of a few texts, by our own kernels (int8 activations), by torch's int4
kernel (bfloat16 activations, scales rounded to bfloat16), each against float32 with the same weights, where nothing
else rounds. Prints a table and writes JSON. It measures no time.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY, BenchmarkError, InputError, check_writable, write_text
from benchmarks.machine import environment_record, publishable
from qengine.config import LoadConfig
from qengine.models.decoder import Decoder
from qengine.runtime.inputs import CpuSteps, StackSteps, Steps
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import load_decoder, open_model
from qengine.scheduling.batch import Batch, BatchEntry
from qengine.tokenizer import load_tokenizer, tokenizer_from_gguf
from quant_kernels.attention.kv_format import plain
from quant_kernels.linear.dispatch import Target

DEFAULT_TEXTS = ("LICENSE", "README.md")
DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "cpu-quality.json"
_CPU = torch.device("cpu")
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Quality:
    """Kernels against float32, over all places of the texts.

    Attributes:
        mean_kl: of the next token's distribution, in nats.
        largest_kl: at any place.
        mean_logprob_change: of the tokens that the texts have, absolute, in nats.
        same_likeliest: fraction of places with the same likeliest token.
    """

    kernels: str
    perplexity: float
    mean_kl: float
    largest_kl: float
    mean_logprob_change: float
    same_likeliest: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        check_writable(options.json)
        prompts = _prompts(options.model, [_read(path) for path in options.texts], options.tokens)
        exact = _logprobs(options.model, prompts, Target(_CPU, torch.float32))
        rows = []
        for name, target in _targets().items():
            rows.append(_compare(name, _logprobs(options.model, prompts, target), exact, prompts))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    perplexity = math.exp(-float(_own(exact, prompts).mean()))
    print(table(perplexity, rows), end="")
    record = {
        "benchmark": "cpu-quality",
        "environment": environment_record(
            shlex.join(["python", "-m", "benchmarks.cpu_quality", *publishable(arguments)])
        ),
        "num_tokens": sum(len(prompt) - 1 for prompt in prompts),
        "perplexity_float32": perplexity,
        "kernels": [asdict(row) for row in rows],
    }
    write_text(options.json, json.dumps(record, indent=2) + "\n")
    return 0


def table(perplexity: float, rows: Sequence[Quality]) -> str:
    """For the terminal."""
    lines = [f"float32: perplexity {perplexity:.4f}", ""]
    lines.append(
        f"{'kernels':<24}{'perplexity':>11}{'mean KL':>11}{'largest KL':>12}{'|dlogprob|':>12}{'same top':>10}"
    )
    for row in rows:
        numbers = f"{row.perplexity:11.4f}{row.mean_kl:11.2e}{row.largest_kl:12.2e}{row.mean_logprob_change:12.2e}"
        lines.append(f"{row.kernels:<24}{numbers}{row.same_likeliest:10.2%}")
    return "\n".join(lines) + "\n"


def _targets() -> dict[str, Target]:
    torchs = Target(_CPU, torch.bfloat16)
    native = Target.of(_CPU, torch.bfloat16)
    if native.native is None:
        raise InputError("the CPU kernels were not built: install qengine where there is a C compiler")
    return {"int8 activations (ours)": native, "bfloat16 (torch)": torchs}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_quality", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    add("--model", help="folder, .gguf file or hub id (default: the bundled model)")
    add("--texts", nargs="+", type=Path, default=[REPOSITORY / text for text in DEFAULT_TEXTS], metavar="FILE")
    add("--tokens", type=int, default=1024, metavar="N", help="of each text (default: 1024)")
    add("--json", type=Path, default=DEFAULT_JSON, metavar="PATH")
    return parser.parse_args(arguments)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable text: {error}") from error


def _prompts(model: str | None, texts: Sequence[str], num_tokens: int) -> list[list[int]]:
    opened = open_model(LoadConfig(model=model))
    if opened.gguf_metadata is not None:
        tokenizer = tokenizer_from_gguf(opened.gguf_metadata)
    else:
        tokenizer = load_tokenizer(str(opened.location.path))
    return [tokenizer.encode(text)[:num_tokens] for text in texts]


@torch.inference_mode()
def _logprobs(model: str | None, prompts: Sequence[Sequence[int]], target: Target) -> list[torch.Tensor]:
    """float32 [tokens, vocab] of each prompt."""
    decoder = load_decoder(open_model(LoadConfig(model=model)), target, max(map(len, prompts)))
    return [_run(decoder, prompt) for prompt in prompts]


def _run(decoder: Decoder, prompt: Sequence[int]) -> torch.Tensor:
    num_blocks = -(-len(prompt) // _BLOCK)
    cache = KVCache(decoder.config, num_blocks, _BLOCK, plain(decoder.dtype), _CPU)
    by_layer = CpuSteps(decoder.rope, cache, decoder.dtype)
    steps: Steps = by_layer if decoder.stack is None else StackSteps(by_layer)
    step = steps.prepare(Batch((BatchEntry("0", tuple(prompt), 0, tuple(range(num_blocks)), None),)))
    hidden = decoder.forward(step.token_ids, cache.layers, step.inputs)
    return torch.log_softmax(decoder.logits(hidden), dim=-1)


def _own(logprobs: Sequence[torch.Tensor], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Of the tokens that follow, all texts together."""
    parts = [
        rows[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1))
        for rows, prompt in zip(logprobs, prompts, strict=True)
    ]
    return torch.cat(parts).squeeze(1)


def _compare(
    name: str, got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], prompts: Sequence[Sequence[int]]
) -> Quality:
    kl = torch.cat([(e.exp() * (e - g)).sum(dim=-1)[:-1] for g, e in zip(got, exact, strict=True)])
    same = torch.cat([g.argmax(-1) == e.argmax(-1) for g, e in zip(got, exact, strict=True)])
    own, expected = _own(got, prompts), _own(exact, prompts)
    return Quality(
        kernels=name,
        perplexity=math.exp(-float(own.mean())),
        mean_kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        mean_logprob_change=float((own - expected).abs().mean()),
        same_likeliest=float(same.float().mean()),
    )


if __name__ == "__main__":
    sys.exit(main())
