"""P16Linear: a quantized linear on a GPU, ready to run.

It asks `tuning.select` once per regime of M what to launch. Used alone it returns the finished result; in a decoder
layer its neighbours take over what would cost launches: `partial_sums` leaves a split's sums to the next kernel, and
`places` tells the kernel before it in which order this one wants its columns. Only rows of padding, which parts of an
activation order have on several ranks, make it order its inputs itself.

Invariant: whichever way it is asked, the numbers are those of `quant_kernels.reference.linear` to the tolerance of the
kernel that ran, and the same on every run. It holds the packed weight and nothing else.
"""

from __future__ import annotations

import torch

from quant_kernels.linear.order import InputOrder
from quant_kernels.linear.p16.expand import expanded_matmul
from quant_kernels.linear.p16.gate_up import gate_up
from quant_kernels.linear.p16.layout import P16Weight, pack
from quant_kernels.linear.p16.matmul import matmul
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.tuning.select import EXPAND, Choice, Problem, Selector, regime


class P16Linear:
    """A PackedWeight in P16 layout with its kernels' choices."""

    kernel = "p16"

    def __init__(self, weight: P16Weight, selector: Selector) -> None:
        self.weight = weight
        self.out_features = weight.out_features
        order = None if weight.perm is None else InputOrder.of(weight.perm)
        is_padded = order is not None and order.is_padded
        self.in_features = weight.in_features if order is None else len(order.index)
        self._own_order = order if is_padded else None
        self._places = None if order is None or is_padded else torch.argsort(order.index).to(torch.int32)
        self._selector = selector
        self._choices: dict[int, Choice] = {}
        self._gate_up_choices: dict[int, Choice | None] = {}

    @classmethod
    def of(cls, record: PackedWeight, dtype: torch.dtype, device: torch.device, selector: Selector) -> P16Linear:
        """A record, packed on the device for activations of `dtype`."""
        return cls(pack(record, dtype, device), selector)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        own = None if self._own_order is None else self._own_order.index
        orders = sum(t.numel() * t.element_size() for t in (self._places, own) if t is not None)
        return self.weight.num_bytes + orders

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one multiplication must read: words and tables."""
        return self.weight.bytes_per_pass

    @property
    def places(self) -> torch.Tensor | None:
        """int32 [K]: where the kernel before this one should store each of its columns; None for their own places."""
        return self._places

    def choice(self, rows: int) -> Choice:
        """What runs x of `rows` rows, and why."""
        key = regime(rows)
        if key not in self._choices:
            self._choices[key] = self._selector.matmul(self._problem(rows))
        return self._choices[key]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K], columns in the layer's own order, to [M, N]."""
        sums = self.partial_sums(self._ordered(x))
        return sums[0] if len(sums) == 1 else sums.sum(0).to(x.dtype)

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K], columns at their `places`, to [1, M, N] or to float32 [S, M, N] that add up to it."""
        if self._own_order is not None:
            x = self._own_order(x)
        choice = self.choice(x.shape[0])
        if choice.kernel == EXPAND:
            return expanded_matmul(x, self.weight, twin=self._selector.twin).unsqueeze(0)
        assert choice.tile is not None, "only expanding has no tile"
        return matmul(x, self.weight, choice.tile, choice.split_k, twin=self._selector.twin)

    def try_silu_mul(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up of a weight [gate | up], in the matmul itself; None where two launches are faster.

        Args:
            x: [M, K], columns in the weight's stored order.

        Returns:
            [M, N / 2].
        """
        assert self._own_order is None, "the rows of gate and up have an input each"
        choice = self._gate_up_choice(x.shape[0])
        if choice is None or choice.tile is None:
            return None
        return gate_up(x, self.weight, choice.tile, twin=self._selector.twin)

    def _gate_up_choice(self, rows: int) -> Choice | None:
        key = regime(rows)
        if key not in self._gate_up_choices:
            self._gate_up_choices[key] = self._selector.gate_up(self._problem(rows))
        return self._gate_up_choices[key]

    def _problem(self, rows: int) -> Problem:
        return Problem(rows, self.weight.in_features, self.out_features, self.weight.scheme)

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        perm = self.weight.perm
        return x if perm is None or self._places is None else x.index_select(1, perm)
