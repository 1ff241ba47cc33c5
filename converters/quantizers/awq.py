"""AWQ (Lin et al., arXiv 2306.00978): inputs that matter are scaled up before rounding, and their producer down.

For a factor s per input, ``W x = (W s) (x / s)``: the division goes into the norm or the linear that makes x, so the
unquantized layer computes what it did, and the inputs with a large s are rounded more finely. s is the mean magnitude
of the input to a power between 0 and 1, searched by the output error of rounding to nearest.
Invariant: `fold` changes no output beyond float rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from converters.quantizers.base import LayerView, LinearGroup, QuantSettings
from converters.quantizers.grid import nearest_values
from converters.quantizers.hessian import Moments

#: Powers tried: 0, 1/STEPS ... 1.
STEPS = 20


def search_factors(layer: LayerView, group: LinearGroup, moments: Moments, settings: QuantSettings) -> torch.Tensor:
    """The factor of each input, [K]: the best over the group's linears together; ones where nothing helps."""
    magnitude = moments.mean_abs / max(moments.weight_sum, 1e-12)
    weights = [layer.linear(name).weight for name in group.names]
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(STEPS + 1):
        factors = per_producer(magnitude, group).clamp(min=1e-4).pow(step / STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        factors = expand(factors, group).to(settings.dense_dtype).float()
        if not bool(torch.isfinite(factors).all() and (factors > 0).all()):
            continue
        loss = sum(_loss(weight, factors, moments.hessian, settings) for weight in weights)
        if loss < least:
            best, least = factors, loss
    return best


def _loss(weight: torch.Tensor, factors: torch.Tensor, hessian: torch.Tensor, settings: QuantSettings) -> float:
    error = nearest_values(weight * factors, settings).div_(factors).sub_(weight)
    return float((error @ hessian).mul_(error).sum())


def per_producer(values: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """One value per channel of the producer: the largest of the inputs that it makes."""
    channels = group.producer_channels
    if channels is None:
        return values
    size = int(channels.max()) + 1
    return values.new_zeros(size).scatter_reduce_(0, channels.to(values.device), values, "amax")


def expand(factors: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """One factor per input from one per channel of the producer."""
    channels = group.producer_channels
    return factors if channels is None else factors[channels.to(factors.device)]


def fold(
    layer: LayerView, group: LinearGroup, factors: torch.Tensor, settings: QuantSettings
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Multiply the group's weights by factors [K] and divide the producer's output by them.

    Returns:
        What the group's inputs are really divided by: a norm's weight is rounded as the file will hold it, and the
        factors follow it. And the producer's tensors as the file will hold them where they stay dense.
    """
    assert group.producer is not None, "only a group with a producer can be scaled"
    producer = layer.module.get_submodule(group.producer)
    if isinstance(producer, nn.Linear):
        channels = group.producer_channels
        own = factors if channels is None else torch.ones_like(factors[: producer.out_features])
        if channels is not None:
            own.scatter_(0, channels.to(factors.device), factors)
        producer.weight.data = producer.weight / own.unsqueeze(1)
    else:
        factors = own = _fold_norm(producer, factors, settings)
    bias = getattr(producer, "bias", None)
    if isinstance(bias, torch.Tensor):
        bias.data = bias / own
    for name in group.names:
        linear = layer.linear(name)
        linear.weight.data = linear.weight * factors
    return factors, {
        f"{group.producer}.{name}": tensor.data.to(settings.dense_dtype)
        for name, tensor in producer.named_parameters(recurse=False)
    }


def _fold_norm(norm: nn.Module, factors: torch.Tensor, settings: QuantSettings) -> torch.Tensor:
    """Divide a norm's weight, as the file will hold it; returns what it is really divided by."""
    offset = norm_offset(norm)
    weight = norm.get_parameter("weight")
    gain = weight.data + offset
    stored = (gain / factors - offset).to(settings.dense_dtype).float()
    exact = gain / (stored + offset)
    usable = torch.isfinite(exact) & (exact > 0)
    weight.data = torch.where(usable, stored, weight.data)
    return torch.where(usable, exact, torch.ones_like(exact))


def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 for Gemma's, found by running it with a weight of zero."""
    weight = norm.get_parameter("weight")
    kept = weight.data
    probe = torch.ones_like(kept)
    probe[::2] = -1.0
    bias = getattr(norm, "bias", None)
    try:
        weight.data = torch.zeros_like(kept)
        found = norm(probe)
        if isinstance(bias, torch.Tensor):
            found = found - bias
    finally:
        weight.data = kept
    return 1.0 if bool(found.abs().max() > 0.5) else 0.0
