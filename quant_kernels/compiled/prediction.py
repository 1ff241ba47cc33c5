"""What the table of budgets says of a launch on a card: whether instructions or memory would be its limit.

A computation from published figures and from counts of instructions, not a measurement. Invariant: what the table does
not know has no prediction. Nothing is compiled here, though triton must be installed, as for every variant.
"""

from __future__ import annotations

from dataclasses import replace

from quant_kernels.compiled.report import read_budgets, share_of_slots
from quant_kernels.compiled.variants import Variant, row_name
from quant_kernels.scheme import Scheme
from quant_kernels.tuning.card import Card
from quant_kernels.tuning.select import EXPAND, Choice


def predicted_issue_share(choice: Choice, scheme: Scheme, card: Card, bytes_per_weight: float) -> float | None:
    """The part of the card's issue slots that `choice` takes at full memory bandwidth; above 1, they are the limit.

    None where the card's figures or the configuration's are not known, and for expanding, which is bound by arithmetic.
    """
    if choice.kernel == EXPAND or not card.bytes_per_s or not card.clock_hz:
        return None
    budgets = read_budgets().rows
    # Scales of another 16-bit type cost the same; only the commonest tiles are in the table with them.
    for known in (scheme, replace(scheme, scale_dtype=scheme.dtype)):
        variant = Variant(choice.kernel, known, choice.tile, card.arch, scheme.dtype)
        instr_per_weight = budgets.get(row_name(variant), {}).get(str(card.arch))
        if instr_per_weight is not None:
            return share_of_slots(card, instr_per_weight, bytes_per_weight)
    return None
