"""Two ranks wholly on Triton's kernels, in its interpreter: what a GPU runs, with the cuts of a split model.

Rows of padding, groups that a cut made smaller, and sums of several shares of K, of which every rank may have another
number, must come out as the same model on the CPU's operations.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from quant_kernels.linear.dispatch import P16
from tests.models.in_memory import Sequences
from tests.models.test_triton_decoder import TARGET, sequences
from tests.parallel.test_ranks import TinySource, tiny, tolerance

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter; see benchmarks.gpu_check")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("act_order", [False, True], ids=["cut groups", "activation order"])
def test_two_ranks_are_one_model(act_order: bool) -> None:
    # Five groups are three and two; a head boundary falls into the middle of a group of o_proj.
    source = TinySource(tiny(5 * 32, (6, 2), num_layers=1, qkv_bias=True), 32, act_order=act_order)
    ranks, single = source.ranks(2, 1, TARGET, sequences), Sequences(source.build())
    for model in ranks.models:
        assert {part.kernel for linear in model.linears() if linear is not model.head for part in linear.parts} == {P16}
    for chunk in ({"a": [5, 6, 7]}, {"a": [8], "b": [9]}):
        found = ranks.step(chunk)
        for name, logits in single.step(chunk).items():
            assert (found[name] - logits).abs().max() < tolerance(source.config, logits)
