"""What the parts that run models measure, as values: a worker gets one as JSON. Lengths in tokens, memory in bytes.

Light on purpose: the parent process that lists and starts parts imports these and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from benchmarks.gpu.models import LOGIT_CONFIGS

GIB = 2**30
#: (tokens before, tokens of the step) of each sequence of a step.
Entries = tuple[tuple[int, int], ...]

_W = TypeVar("_W", bound="JsonWorkload")


@dataclass(frozen=True, slots=True)
class JsonWorkload:
    """To JSON and back, for frozen values of numbers, names and tuples of them."""

    def to_json(self) -> dict[str, Any]:
        """Tuples become lists when they are written."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls: type[_W], record: Mapping[str, Any]) -> _W:
        """The value that was written."""
        return cls(**{key: _tuples(value) for key, value in record.items()})


def weights_text(quantization: str | None) -> str:
    """How reports call weights: "gptq" is 4 bits in groups of 128 with a constant zero point."""
    return "16-bit" if quantization is None else "4-bit, groups of 128"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True)
class Attention(JsonWorkload):
    """Attention alone.

    Attributes:
        formats: of the KV cache.
        contexts, batches: of decode steps, every pair of them.
        prompts: other steps, by name.
    """

    formats: tuple[str, ...] = ("float16", "int8", "fp8_e4m3", "fp8_e5m2")
    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    prompts: tuple[tuple[str, Entries], ...] = (
        ("prompt of 2048", ((0, 2048),)),
        ("prompt of 4096", ((0, 4096),)),
        ("chunk of 2048 after 6144", ((6144, 2048),)),
        ("2048 + 16 decodes", ((0, 2048), *(((2047, 1),) * 16))),
    )
    rounds: int = 5

    def steps(self) -> Iterator[tuple[str, Entries]]:
        """Decode steps, then the others."""
        for context in self.contexts:
            for batch in self.batches:
                yield "decode", ((context - 1, 1),) * batch
        yield from self.prompts


@dataclass(frozen=True, slots=True)
class EndToEnd(JsonWorkload):
    """A model's speeds and memory.

    Attributes:
        quantization: see `weights_text`.
        variants: see `end_to_end.VARIANTS`.
        batches: sequences that decode at once.
        prompt_tokens, decode_tokens: of each of them.
        prefill_tokens: of the long prompt.
        memory_limit: for the whole process, as a user of a smaller card has it.
    """

    model: str
    quantization: str | None = "gptq"
    variants: tuple[str, ...] = ("graphs", "eager")
    batches: tuple[int, ...] = (1, 8, 32, 128)
    prompt_tokens: int = 32
    decode_tokens: int = 128
    prefill_tokens: int = 2048
    runs: int = 3
    memory_limit: int | None = 24 * GIB


@dataclass(frozen=True, slots=True)
class Logits(JsonWorkload):
    """Models, by their name in `models.LOGIT_CONFIGS`, against transformers.

    Attributes:
        quantizations: each model has each; see `weights_text`.
        lengths: tokens of the two sequences.
        decoded: the last of them that are computed one by one.
    """

    models: tuple[str, ...] = tuple(LOGIT_CONFIGS)
    quantizations: tuple[str | None, ...] = (None, "gptq")
    lengths: tuple[int, int] = (700, 430)
    decoded: int = 40


@dataclass(frozen=True, slots=True)
class Serving(JsonWorkload):
    """Many requests at once. Lengths are drawn evenly from their ranges, ends included.

    Attributes:
        peer_requests: how many of them, the first ones, the peer is timed on.
    """

    model: str
    requests: int = 64
    prompt_range: tuple[int, int] = (32, 1024)
    output_range: tuple[int, int] = (16, 256)
    runs: int = 3
    peer_requests: int = 6
    seed: int = 0
    memory_limit: int | None = 24 * GIB


@dataclass(frozen=True, slots=True)
class Fit(JsonWorkload):
    """A model in the memory of smaller cards, shared by ranks on one card.

    Attributes:
        ranks: processes that share every layer; each may take `memory_limit` bytes.
        sequences: at once; None for as many as the plan holds.
        tokens: of each sequence, prompt and answer together; None for the model's longest.
        decode_tokens: of them, computed one by one.
    """

    model: str
    ranks: int = 1
    quantization: str | None = "gptq"
    sequences: int | None = None
    tokens: int | None = None
    decode_tokens: int = 128
    memory_limit: int = 24 * GIB
