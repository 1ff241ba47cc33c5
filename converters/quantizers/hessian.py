"""What calibration says about the inputs of a group of linears: second moments, summed batch by batch.

With x the inputs that the quantized layers before make and w a weight per position: ``hessian = sum w x x^T``, float32
[K, K], and ``mean_abs = sum w |x|``, [K].
The output error of codes with error E is then ``trace(E hessian E^T)``, without seeing the inputs again.
Invariant: memory does not grow with the calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from converters.quantizers.base import LayerInputs, LayerView, LinearGroup, QuantizationError


@dataclass(slots=True)
class Moments:
    """Sums over positions; see the module."""

    hessian: torch.Tensor
    mean_abs: torch.Tensor
    weight_sum: float = 0.0

    @staticmethod
    def empty(in_features: int, device: torch.device) -> Moments:
        """Of no position yet."""
        square = torch.zeros(in_features, in_features, device=device)
        return Moments(square, torch.zeros(in_features, device=device))

    def add(self, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add positions: x [M, K], weights [M] or None for ones."""
        scaled = x if weights is None else x * weights.unsqueeze(1)
        self.hessian.addmm_(scaled.t(), x)
        self.mean_abs += scaled.abs().sum(dim=0)
        self.weight_sum += float(len(x) if weights is None else weights.sum())

    def divide_(self, factors: torch.Tensor) -> None:
        """Make them those of inputs that are divided by factors [K]."""
        self.hessian.div_(factors).div_(factors.unsqueeze(1))
        self.mean_abs.div_(factors)


class _Captured(Exception):  # noqa: N818 - not an error: it ends a forward pass whose rest is not needed
    """Stops a layer once the inputs of a linear are known."""


def collect(
    layer: LayerView,
    groups: tuple[LinearGroup, ...],
    inputs: LayerInputs,
    weigh: bool = False,
) -> list[Moments]:
    """The moments of groups of a layer, over all batches.

    Args:
        weigh: positions count by 1 / mean square of the layer's input, where a group's output is added to it.

    Raises:
        QuantizationError: naming layer and sample, if inputs are not finite.
    """
    sums = [_empty(layer, group) for group in groups]
    for index in range(len(inputs)):
        hidden = inputs.hidden(index)
        _require_finite(hidden, layer.name, inputs, index, len(hidden))
        found = _group_inputs(layer.module, groups, inputs, hidden)
        stream = hidden.reshape(-1, hidden.shape[-1]).square().mean(dim=1)
        for place, group in enumerate(groups):
            x = found[place]
            if x is None:
                continue
            _require_finite(x, f"{layer.name}.{group.names[0]}", inputs, index, len(hidden))
            weights = stream.clamp(min=1e-12).reciprocal() if weigh and _adds(layer, group, hidden) else None
            # An expert sees some positions only, and does not say which.
            sums[place].add(x, weights if len(x) == len(stream) else None)
    return sums


def _require_finite(values: torch.Tensor, where: str, inputs: LayerInputs, index: int, num_samples: int) -> None:
    if bool(values.isfinite().all()):
        return
    which = "a calibration sample"
    if len(values) % num_samples == 0:
        finite = values.reshape(num_samples, -1).isfinite().all(dim=1)
        which = f"calibration sample {inputs.sample(index, int((~finite).nonzero()[0]))}"
    raise QuantizationError(
        f"{where}: {which} gives inputs that are not finite; expected finite numbers; leave the sample out, or check "
        "the model's weights in this layer and those before"
    )


def _empty(layer: LayerView, group: LinearGroup) -> Moments:
    linear = layer.linear(group.names[0])
    return Moments.empty(linear.in_features, linear.weight.device)


def _adds(layer: LayerView, group: LinearGroup, hidden: torch.Tensor) -> bool:
    """Whether the group is one linear whose output is added to the layer's input, as those of attention and MLP are."""
    return len(group.names) == 1 and layer.linear(group.names[0]).out_features == hidden.shape[-1]


def _group_inputs(
    module: nn.Module, groups: tuple[LinearGroup, ...], inputs: LayerInputs, hidden: torch.Tensor
) -> list[torch.Tensor | None]:
    """What is fed to each group, [M, K]; None for one that was not run. Stops after the last."""
    found: list[torch.Tensor | None] = [None] * len(groups)

    def keep(place: int, args: tuple[torch.Tensor, ...]) -> None:
        found[place] = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        if all(part is not None for part in found):
            raise _Captured

    def hook(place: int) -> object:
        linear = module.get_submodule(groups[place].names[0])
        return linear.register_forward_pre_hook(lambda _, args: keep(place, args))

    hooks = [hook(place) for place in range(len(groups))]
    try:
        inputs.run(module, hidden)
    except _Captured:
        pass
    finally:
        for handle in hooks:
            handle.remove()  # type: ignore[attr-defined]
    return found
