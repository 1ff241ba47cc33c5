"""The checkpoint check: a short forward before the first request, for weights that cannot be meant.

`examine` runs a few tokens through the loaded model, layer by layer, and notes where numbers stop being finite and
whether every input is answered by the same token; `judge` says what that means for a user. It is the first step that
the model runs, and so warms up what a first step must. Invariant: the cache holds no NaN afterwards, and no request has
seen it. It reads no files, and is not a measure of quality.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import torch

from qengine.errors import LoadError
from qengine.runtime.inputs import PreparedStep, StackSteps
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.batch import Batch, BatchEntry

logger = logging.getLogger(__name__)

#: Few rows, since a large model on a CPU takes a tenth of a second for each; more where they are needed to be sure.
_NUM_SEQUENCES = 4
_SHORT_LEN, _LONG_LEN = 2, 8
#: Fewer rows than this may agree by chance.
_LEAST_ROWS = 8
_STAGE_BEFORE = "stage before"


@dataclass(frozen=True, slots=True)
class BadNumbers:
    """Where numbers stop being finite.

    Attributes:
        layer: None outside the layers.
        part: "embedding", "attention", "mlp", "final norm" or "head".
        has_nan, has_inf: what is found there.
    """

    layer: int | None
    part: str
    has_nan: bool
    has_inf: bool

    @property
    def place(self) -> str:
        """For people: "layer 3 (mlp)"."""
        return f"the {self.part}" if self.layer is None else f"layer {self.layer} ({self.part})"

    @property
    def kind(self) -> str:
        """What was found, for people."""
        return " and ".join([name for name, found in (("NaN", self.has_nan), ("infinity", self.has_inf)) if found])


@dataclass(frozen=True, slots=True)
class Findings:
    """What the forward showed: the first place that is not finite, and the one token that answers everything."""

    bad: BadNumbers | None = None
    constant_token_id: int | None = None


class _Probes:
    """Notes NaN and infinity of tensors in the order of computation, without waiting for the device."""

    def __init__(self) -> None:
        self._places: list[tuple[int | None, str]] = []
        self._flags: list[torch.Tensor] = []

    def note(self, values: torch.Tensor, layer: int | None, part: str) -> None:
        self._places.append((layer, part))
        self._flags.append(torch.stack([values.isnan().any(), values.isinf().any()]))

    def first_bad(self) -> BadNumbers | None:
        flags = torch.stack(self._flags).tolist()
        for (layer, part), (has_nan, has_inf) in zip(self._places, flags, strict=True):
            if has_nan or has_inf:
                return BadNumbers(layer, part, has_nan, has_inf)
        return None


@torch.inference_mode()
def examine(runner: ModelRunner, *, max_len: int, max_rows: int) -> Findings:
    """Run a few tokens of a few made-up prompts. All ranks of a model do it together.

    Args:
        runner: nothing that is still wanted may be in the first blocks of its cache.
        max_len: tokens that a sequence may have.
        max_rows: tokens that a step may have.

    Returns:
        What happens in this rank's layers; which token answers, only where there are logits.
    """
    answers: list[int] = []
    # A stage without logits cannot tell whether more rows are needed, and the others must do as it does.
    for length in (_SHORT_LEN, _LONG_LEN) if runner.links.pipe.size == 1 else (_LONG_LEN,):
        bad, found = _run(runner, _batch(runner, length, max_len, max_rows))
        answers += found
        if bad is not None or len(set(answers)) > 1:
            return Findings(bad)
    is_constant = len(answers) >= _LEAST_ROWS and len(set(answers)) == 1
    return Findings(None, answers[0] if is_constant else None)


def _batch(runner: ModelRunner, wanted_len: int, max_len: int, max_rows: int) -> Batch:
    """Random tokens, as many as there is room for."""
    cache, vocab_size = runner.cache, runner.model.config.vocab_size
    capacity = cache.num_blocks * cache.block_size
    length = max(1, min(wanted_len, max_len, max_rows, capacity))
    blocks = -(-length // cache.block_size)
    count = max(1, min(_NUM_SEQUENCES, max_rows // length, cache.num_blocks // blocks))
    numbers = random.Random(length)
    entries = []
    for index in range(count):
        token_ids = tuple(numbers.randrange(vocab_size) for _ in range(length))
        block_ids = tuple(range(index * blocks, (index + 1) * blocks))
        entries.append(BatchEntry(str(index), token_ids, 0, block_ids, None))
    return Batch(tuple(entries))


def _run(runner: ModelRunner, batch: Batch) -> tuple[BadNumbers | None, list[int]]:
    """The first place that is not finite, and the likeliest next token after every row.

    Layers that run as one call are looked into only where what they compute is not finite.
    """
    step, steps = runner.steps.prepare(batch), runner.steps
    if isinstance(steps, StackSteps):
        logits = runner.model.logits(runner.model.forward(step.token_ids, runner.cache.layers, step.inputs))
        if bool(logits.isfinite().all()):
            return None, logits.argmax(dim=-1).tolist()
        step = steps.by_layer.prepare(batch)
    probes = _Probes()
    found = _forward(runner, step, probes)
    bad = probes.first_bad()
    if bad is None and isinstance(steps, StackSteps):
        bad = BadNumbers(None, "head", bool(logits.isnan().any()), bool(logits.isinf().any()))
    if bad is not None:
        runner.cache.clear_not_finite([block_id for entry in batch.entries for block_id in entry.block_ids])
    if bad is not None and bad.part == _STAGE_BEFORE:
        bad = None  # That stage says so itself, and better.
    return bad, [] if found is None else found.argmax(dim=-1).tolist()


def _forward(runner: ModelRunner, step: PreparedStep, probes: _Probes) -> torch.Tensor | None:
    """`Decoder.forward` and the logits of every row, with a look at each block's sums and the residual after them.

    None where a later stage has the logits.
    """
    model = runner.model
    residual = runner.stage_input(step)
    before: tuple[int | None, str] = (None, _STAGE_BEFORE)
    if model.embedding is not None:
        residual, before = model.embedding(residual), (None, "embedding")
    first_layer = 0 if runner.links.layers is None else runner.links.layers.start
    sums = None
    for index, (layer, layer_cache) in enumerate(zip(model.layers, runner.cache.layers, strict=True), first_layer):
        attended = layer.attend(sums, residual, layer_cache, step.inputs)
        probes.note(residual, *before)
        probes.note(attended, index, "attention")
        sums = layer.feed(attended, residual)
        probes.note(residual, index, "attention")
        probes.note(sums, index, "mlp")
        before = (index, "mlp")
    assert sums is not None, "a stage has a layer"
    if model.norm is None:
        residual.add_(sums[0] if len(sums) == 1 else sums.sum(0))
        probes.note(residual, *before)
        runner.hand_on(residual)
        return None
    hidden = model.norm.add(sums, residual)
    probes.note(residual, *before)
    probes.note(hidden, None, "final norm")
    logits = model.logits(hidden)
    probes.note(logits, None, "head")
    return logits


def judge(findings: Findings, name: str, dtype: torch.dtype, stored_dtype: str | None) -> None:
    """Refuse a model that computes no numbers; warn of one that always says the same.

    Args:
        stored_dtype: what the config says that the model was made in.

    Raises:
        LoadError: naming the first bad layer, what was found there, and what to do.
    """
    if findings.bad is not None:
        raise LoadError(_refusal(findings.bad, name, dtype, stored_dtype))
    if findings.constant_token_id is not None:
        logger.warning(
            "%s answers every input with the same token (id %d): its weights are probably damaged, or its format is "
            "not what its config says; compare with the model's page, or download it again",
            name,
            findings.constant_token_id,
        )


def _refusal(bad: BadNumbers, name: str, dtype: torch.dtype, stored_dtype: str | None) -> str:
    override = "--skip-check starts it nonetheless"
    if dtype == torch.float16 and stored_dtype == "bfloat16":
        return (
            f"{name} overflows float16: {bad.kind} in {bad.place}; it was made in bfloat16, which reaches further: use "
            f"--dtype bfloat16; if that computes {bad.kind} too, the file is damaged ({override})"
        )
    return (
        f"{name} computes {bad.kind} in {bad.place}: the file is damaged or was quantized badly; download it again, or "
        f"take another quantization of it ({override})"
    )
