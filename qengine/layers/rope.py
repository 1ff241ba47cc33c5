"""The angles of rotary position embedding, half-split: pairs are (i, i + head_dim / 2), as in transformers' files.

``[x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]`` with angle ``position * theta^(-2i / head_dim)`` (Su et al. 2021).
Scalings: linear divides every frequency; llama3 divides the slow ones only (Llama 3.1's config keys); factors divides
each frequency by its own number. Invariant: angles are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

import math

import torch

from qengine.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2], scaling applied."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "factors":
        return frequencies / torch.tensor(rope.factors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended linearly in 1/wavelength."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


class RotaryEmbedding:
    """Cosines and sines of every position, computed once: float32 [max_position, head_dim / 2] each."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_position: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_position).float(), inverse_frequencies(rope, head_dim))
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [rows, 1, head_dim / 2], for int64 positions [rows]. Once per step, for all layers."""
        cos, sin = (table.index_select(0, positions).unsqueeze(1).to(dtype) for table in (self.cos, self.sin))
        return cos, sin
