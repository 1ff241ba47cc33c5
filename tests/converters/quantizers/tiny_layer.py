"""A decoder layer of a few kilobytes with grouped-query attention and a gated MLP, and inputs that are correlated."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from converters.quantizers import LayerView, LinearGroup

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 16, 96
QKV = ("attention.q", "attention.k", "attention.v")


class Norm(nn.Module):
    """RMS norm; `offset` is added to the weight, as Gemma does."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5 - offset)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.weight + self.offset)


class Attention(nn.Module):
    """Causal, without positions."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.k = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=bias)
        self.v = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=bias)
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: torch.Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Norm, attention, norm, gated MLP."""

    def __init__(self, bias: bool = False, offset: float = 0.0) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp_norm = Norm(offset), Attention(bias), Norm(offset)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=bias)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        y = self.mlp_norm(x)
        out: torch.Tensor = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return out


def make_layer(seed: int = 0, bias: bool = False, offset: float = 0.0) -> LayerView:
    """A layer with the groups that a driver would find."""
    torch.manual_seed(seed)
    head = torch.arange(HEADS * HEAD_DIM)
    channels = head // HEAD_DIM // (HEADS // KV_HEADS) * HEAD_DIM + head % HEAD_DIM
    groups = (
        LinearGroup(QKV, "norm"),
        LinearGroup(("attention.o",), "attention.v", channels),
        LinearGroup(("gate", "up"), "mlp_norm"),
        LinearGroup(("down",), "up"),
    )
    return LayerView("model.layers.3", Layer(bias, offset).requires_grad_(False), groups)


class Inputs:
    """Correlated hidden states with a few loud channels, and what the layer makes of them before it is quantized."""

    def __init__(self, layer: LayerView, batches: int = 6, length: int = 40, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(HIDDEN, HIDDEN, generator=generator) * torch.logspace(0, -2, HIDDEN).unsqueeze(1)
        loud = torch.ones(HIDDEN)
        loud[::17] = 12.0
        shape = (batches, 1, length, HIDDEN)
        self.states = list(torch.randn(shape, generator=generator) @ mix * loud)
        self.targets = [layer.module(x) for x in self.states]

    def __len__(self) -> int:
        return len(self.states)

    def hidden(self, index: int) -> torch.Tensor:
        return self.states[index]

    def sample(self, index: int, row: int) -> int:
        return 100 * index + row

    def run(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module(hidden)
        return out

    def error(self, module: nn.Module) -> float:
        """Of the layer's output, as a fraction of what the layer adds."""
        pairs = [(self.run(module, x) - t, t - x) for x, t in zip(self.states, self.targets, strict=True)]
        return sum(float(e.square().sum()) for e, _ in pairs) / sum(float(t.square().sum()) for _, t in pairs)
