"""The interface of an engine under test, and what it is told about the model.

Invariant: every call that measures starts fresh processes and leaves none behind, so engines can take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common import FIRST_TOKEN_PROMPT, Workload


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model under test. Counts are numbers of weights in matrices, sizes are bytes.

    Attributes:
        path: the file or folder.
        layer_params: weights in the decoder layers' matrices.
        head_params: weights in the output projection.
        kv_values_per_token: numbers that one token adds to the KV cache.
        tied: the head uses the embedding's weights.
    """

    name: str
    path: Path
    description: str
    quantization: str | None
    vocab_size: int
    max_position: int
    layer_params: int
    head_params: int
    kv_values_per_token: int
    tied: bool

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    def to_json(self) -> dict[str, Any]:
        """For workers and results; the path is given apart, since results are published."""
        names = [f for f in self.__dataclass_fields__ if f != "path"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class StartReading:
    """One start of a fresh process."""

    first_token_s: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class SpeedReading:
    """One process's speeds in tokens per second, all sequences together.

    Attributes:
        decode: by number of sequences.
        weight_bytes_per_token: bytes of weights that one decode step reads; None where unknown.
        kv_bytes_per_token: bytes that one token takes in the KV cache.
    """

    prompt: float
    decode: Mapping[int, float]
    weight_bytes_per_token: int | None
    kv_bytes_per_token: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Task:
    """What an engine gets to do its work."""

    model: ModelFacts
    workload: Workload
    environment: Mapping[str, str]
    timeout_s: float

    def worker_spec(self) -> dict[str, Any]:
        """The JSON handed to the Python workers."""
        return {
            "path": str(self.model.path),
            "model": self.model.to_json(),
            "workload": self.workload.to_json(),
            "context_tokens": min(self.workload.context_tokens, self.model.max_position),
            "text": FIRST_TOKEN_PROMPT,
        }


class EngineUnderTest(Protocol):
    """One engine, used as a context manager. `problem` is asked first; the other calls assume it found none."""

    name: str
    #: The name with what readers of a table must know.
    label: str
    #: What its figures mean where that differs between engines, by kind of figure.
    meaning: Mapping[str, str]

    def __enter__(self) -> EngineUnderTest: ...

    def __exit__(self, *_: object) -> None: ...

    def problem(self, model: ModelFacts) -> str | None:
        """Why it cannot run this model here, and how that can be changed; None if it can."""
        ...

    def version(self) -> str:
        """Which release of it runs here."""
        ...

    def prepare(self, task: Task) -> None:
        """Work that is not timed and done once, such as converting the model."""
        ...

    def start(self, task: Task) -> StartReading:
        """From a fresh process to the first token."""
        ...

    def speed(self, task: Task, round_number: int) -> SpeedReading:
        """Prompt and decode speeds, after a warm-up inside the process."""
        ...
