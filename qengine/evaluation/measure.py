"""`evaluate`: perplexity of a model, and its distance from the original that it was quantized from.

Only one model is in memory at a time. The original runs first, and leaves its last hidden states (in memory, or in a
temporary file where they are many) and its output head: from these its distributions are computed again, a few rows at
a time, beside the model's. So a card that holds either model can compare them.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from qengine.config import EngineConfig
from qengine.errors import ConfigError, QEngineError
from qengine.evaluation.figures import Evaluation, ModelFigures, Protocol, comparison, perplexity
from qengine.evaluation.forward import Forward
from qengine.evaluation.scoring import Scores, compare, score
from qengine.evaluation.texts import TokenText, load_text, tokenize
from qengine.evaluation.windows import Window, cut
from qengine.layers.linear import Linear
from qengine.runtime.loader import OpenedModel, open_model, verify_files
from qengine.runtime.platform import choose_device, choose_dtype
from qengine.startup import EngineInfo, model_tokenizer
from qengine.tokenizer import Tokenizer

DEFAULT_WINDOW = 2048
#: Hidden states beyond this go to a temporary file.
_MEMORY_BYTES = 2**30
_MAX_SHOWN = 40


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model that was opened and not loaded."""

    config: EngineConfig
    opened: OpenedModel
    tokenizer: Tokenizer

    @classmethod
    def open(cls, config: EngineConfig, *, show_progress: bool) -> _Candidate:
        opened = open_model(config.load)
        verify_files(opened, config.load, show_progress=show_progress)
        return cls(config, opened, model_tokenizer(config, opened))


def evaluate(
    model: str | None = None,
    *,
    against: str | None = None,
    text: str = "builtin",
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    show_progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Measure `model`, and compare it with `against`, if given.

    Args:
        model: a folder, a .gguf file, a hub id; None or "demo" for the bundled model.
        against: the original, by the same names; computed in the same dtype and on the same device.
        text: "builtin", a .txt file (one sequence), a .jsonl file (a sequence per row, with "text" or "messages"), or a
            dataset of the hub.
        window: tokens read together; None is 2048, or the model's context where that is shorter.
        stride: from window to window; None is the window: no overlap, as quantization papers measure.
        max_tokens: of the text, from its start; None for all.
        options: as of `LLM`: quantization, dtype, device, tokenizer and so on.

    Raises:
        ConfigError: an option is wrong, the text cannot be read, or the two models have different tokenizers.
        LoadError: a model cannot be loaded. Both before weights are read.
        QEngineError: the model computes no numbers, or hidden states find no room on the disk.
    """
    started = time.monotonic()
    _require_positive(window=window, stride=stride, max_tokens=max_tokens)
    config = EngineConfig.from_options({**options, "model": model})
    texts = load_text(text)
    candidate = _Candidate.open(config, show_progress=show_progress)
    original = None
    if against is not None:
        load = replace(config.load, model=against, quantization=None, verify=False)
        original = _Candidate.open(replace(config, load=load), show_progress=show_progress)
        _require_same_tokens(original, candidate)
        candidate, original = _in_one_dtype(candidate, original)
    window = window or _default_window(candidate, original)
    stride = window if stride is None else stride
    if window < 2 or stride > window:
        raise ConfigError(
            f"window is {window} and stride is {stride}, expected a window of at least 2 tokens, and a stride that is "
            "not longer"
        )
    tokens = tokenize(texts, candidate.tokenizer, max_tokens)
    windows = list(cut(tokens.sequences, window, stride))
    run = _Run(windows, window, candidate.opened.config.vocab_size, show_progress)
    model_figures, original_figures, scores = run.measure(candidate, original)
    return Evaluation(
        _protocol(tokens, windows, window, stride, candidate.tokenizer),
        model_figures,
        original_figures,
        None if original_figures is None else comparison(scores),
        time.monotonic() - started,
    )


class _Run:
    """The measuring itself, once all is checked."""

    def __init__(self, windows: Sequence[Window], window: int, vocab_size: int, show_progress: bool) -> None:
        self._windows = windows
        self._window = window
        self._vocab_size = vocab_size
        self._show_progress = show_progress

    def measure(
        self, candidate: _Candidate, original: _Candidate | None
    ) -> tuple[ModelFigures, ModelFigures | None, Scores]:
        scores = Scores()
        if original is None:
            info = self._score(candidate, scores)
            return _figures(info, scores.nll), None, scores
        with tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES) as file:
            states = _States(file)
            original_info, head = self._remember(original, states)
            info = self._compare(candidate, states, head, scores)
        return _figures(info, scores.nll), _figures(original_info, scores.original_nll), scores

    def _score(self, candidate: _Candidate, scores: Scores) -> EngineInfo:
        forward = self._load(candidate)
        for window, hidden in self._progress(forward, "Scoring"):
            score(scores, hidden, forward.logits, window.targets, self._vocab_size)
        forward.close()
        return forward.info

    def _remember(self, original: _Candidate, states: _States) -> tuple[EngineInfo, Linear]:
        """Run the original; what stays in memory is its head."""
        forward = self._load(original)
        for _, hidden in self._progress(forward, "Original"):
            states.write(hidden)
        head = forward.executor.runner.model.head
        assert head is not None, "the whole model is here"
        info = forward.info
        forward.close()
        del forward
        gc.collect()
        return info, head

    def _compare(self, candidate: _Candidate, states: _States, head: Linear, scores: Scores) -> EngineInfo:
        forward = self._load(candidate)
        states.rewind()
        for window, hidden in self._progress(forward, "Scoring"):
            original_hidden = states.read(len(hidden))
            compare(
                scores, hidden, forward.logits, original_hidden, head.in_float32, window.targets, self._vocab_size,
            )  # fmt: skip
        forward.close()
        return forward.info

    def _load(self, candidate: _Candidate) -> Forward:
        return Forward.load(candidate.config, candidate.opened, self._window, show_progress=self._show_progress)

    def _progress(self, forward: Forward, name: str) -> Iterator[tuple[Window, torch.Tensor]]:
        """Each window with its hidden states, under a bar of tokens."""
        total = sum(len(window.token_ids) for window in self._windows)
        with tqdm(total=total, desc=name, unit=" tokens", disable=not self._show_progress, leave=False) as bar:
            for window, hidden in zip(self._windows, forward.hidden_states(self._windows), strict=True):
                yield window, hidden
                bar.update(len(window.token_ids))


class _States:
    """Hidden states in a file, written and read in the same order."""

    def __init__(self, file: tempfile.SpooledTemporaryFile[bytes]) -> None:
        self._file = file
        self._like: torch.Tensor | None = None

    def write(self, hidden: torch.Tensor) -> None:
        """[rows, hidden].

        Raises:
            QEngineError: if the disk is full.
        """
        self._like = hidden[:0]
        try:
            self._file.write(hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            raise QEngineError(
                f"the original's hidden states find no room in {tempfile.gettempdir()} ({error.strerror}); take less "
                "of the text with --max-tokens, or set TMPDIR to a larger disk"
            ) from error

    def rewind(self) -> None:
        """Read from the start."""
        self._file.seek(0)

    def read(self, num_rows: int) -> torch.Tensor:
        """The next rows, on the device where they were."""
        assert self._like is not None, "written before it is read"
        row_bytes = self._like.shape[1] * self._like.element_size()
        data = self._file.read(num_rows * row_bytes)
        assert len(data) == num_rows * row_bytes, "both models run the same windows"
        rows = torch.frombuffer(bytearray(data), dtype=self._like.dtype).view(num_rows, -1)
        return rows.to(self._like.device)


def _require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected a whole number of at least 1")


def _default_window(*candidates: _Candidate | None) -> int:
    return min([DEFAULT_WINDOW, *(c.opened.config.max_position for c in candidates if c is not None)])


def _require_same_tokens(original: _Candidate, candidate: _Candidate) -> None:
    """Distributions can be compared only if each of their entries means the same."""
    names = f"{original.opened.location.name} and {candidate.opened.location.name}"
    sizes = (original.opened.config.vocab_size, candidate.opened.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{names} have vocabularies of {sizes[0]} and {sizes[1]} tokens, so they cannot be compared")
    for token_id in range(max(original.tokenizer.vocab_size, candidate.tokenizer.vocab_size)):
        first, second = (c.tokenizer.token_bytes(token_id) for c in (original, candidate))
        if first != second:
            raise ConfigError(
                f"{names} have different tokenizers, so they cannot be compared: token {token_id} is "
                f"{first[:_MAX_SHOWN]!r} and {second[:_MAX_SHOWN]!r}"
            )


def _in_one_dtype(candidate: _Candidate, original: _Candidate) -> tuple[_Candidate, _Candidate]:
    """Both in the dtype that the original runs in, so that their difference is not one of rounding."""
    load = original.config.load
    device = choose_device(load.device)
    dtype = str(choose_dtype(load.dtype, device, original.opened.config.torch_dtype)).removeprefix("torch.")

    def fixed(found: _Candidate) -> _Candidate:
        return replace(found, config=replace(found.config, load=replace(found.config.load, dtype=dtype)))

    return fixed(candidate), fixed(original)


def _figures(info: EngineInfo, nll: Sequence[torch.Tensor]) -> ModelFigures:
    value, error = perplexity(torch.cat(list(nll)))
    return ModelFigures(info.model, f"{info.architecture}, {info.description}", info.dtype, info.device, value, error)


def _protocol(tokens: TokenText, windows: Sequence[Window], window: int, stride: int, tokenizer: Tokenizer) -> Protocol:
    bos = tokenizer.bos_token_id
    has_bos = bos is not None and all(sequence[0] == bos for sequence in tokens.sequences)
    return Protocol(
        text=tokens.name,
        num_sequences=len(tokens.sequences),
        num_tokens=tokens.num_tokens,
        num_scored=sum(len(found.targets) for found in windows),
        window=window,
        stride=stride,
        num_windows=len(windows),
        bos=tokenizer.token_text(bos) if has_bos and bos is not None else None,
    )
