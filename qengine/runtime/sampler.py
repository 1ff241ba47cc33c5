"""From logits to tokens, for all sampling rows of a step at once.

Order, as in vLLM: logit_bias, allowed tokens, grammar, min_tokens -> repetition, presence, frequency penalties ->
greedy rows take the argmax -> temperature -> min_p -> top_k -> top_p -> sample. Reported log-probabilities are of the
raw logits.
Invariant: a row's token depends on its own logits, parameters, seed and position only, never on its neighbours: the
random number is a hash of (seed, position) and sampling inverts the row's own distribution with it, in the order of
token ids. So a seed gives the same token on every device, but where rounding moves a boundary.

`begin` queues the work and `finish` waits for it. On a CUDA device with Triton nothing in between waits: the host can
prepare the next step. It does not touch requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qengine.runtime.sampling import torch_choice
from qengine.runtime.sampling.edits import Edits
from qengine.runtime.sampling.history import Histories
from qengine.runtime.sampling.logprobs import PendingLogprobs, RawLogprobs
from qengine.runtime.sampling.settings import RowSettings, uniform
from qengine.runtime.sampling.transfer import Arrival, to_host
from qengine.scheduling.batch import SampledToken, SampleSpec
from quant_kernels.late import try_import

__all__ = ["Choose", "PendingSamples", "Sampler", "make_sampler", "uniform"]

#: Edited logits [rows, vocab] to token ids [rows], -1 where a row is not finite.
Choose = Callable[[torch.Tensor, RowSettings], torch.Tensor]


class PendingSamples:
    """Tokens that the device may still be drawing.

    Attributes:
        token_ids: int [rows] on the device, for a next step that does not wait; -1 where logits were not finite.
    """

    def __init__(self, token_ids: torch.Tensor, logprobs: PendingLogprobs | None = None) -> None:
        self.token_ids = token_ids
        self._logprobs = logprobs
        self._on_host = to_host(token_ids)
        self._arrival = Arrival(token_ids.device)

    def finish(self) -> list[SampledToken | None]:
        """Wait for the tokens.

        Returns:
            One per row; None for a row whose logits held NaN or +inf, or left nothing to choose from.
        """
        self._arrival.wait()
        tokens: list[int] = self._on_host.tolist()
        records = self._logprobs.records(tokens) if self._logprobs is not None else [None] * len(tokens)
        return [
            SampledToken(token, record) if token >= 0 else None for token, record in zip(tokens, records, strict=True)
        ]


class Sampler:
    """Samples the rows of one step after another, on one device."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._histories = Histories()

    def begin(
        self, logits: torch.Tensor, specs: Sequence[SampleSpec], allowed: Sequence[bytes | None] = ()
    ) -> PendingSamples:
        """Queue the sampling of every row.

        Args:
            logits: [rows, vocab] in float32, float16 or bfloat16, contiguous. Float32 may be changed in place.
            specs: one per row.
            allowed: one per row, a bit for each token that its grammar allows, or None; empty: no row has a grammar.
        """
        vocab = logits.shape[1]
        raw = RawLogprobs.of(logits, specs)
        edits = Edits.of(specs, self._histories.of(specs), vocab, allowed)
        if edits:
            logits = logits.float()
            edits.apply(logits)
        token_ids = self._choose(logits, RowSettings.of(specs, vocab))
        return PendingSamples(token_ids, None if raw is None else raw.report(token_ids))


def make_sampler(*, on_triton: bool) -> Sampler:
    """A sampler: on Triton's kernel if that is wanted and triton is installed, else on torch."""
    module = try_import("qengine.runtime.sampling.triton_choice") if on_triton else None
    return Sampler(torch_choice.choose if module is None else module.choose)
