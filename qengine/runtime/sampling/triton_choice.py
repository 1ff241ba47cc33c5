"""Choosing tokens with the Triton kernel: the settings go over in one copy, then one launch."""

from __future__ import annotations

import numpy as np
import torch

from qengine.runtime.sampling.settings import RowSettings
from qengine.runtime.sampling.transfer import to_device
from quant_kernels.sampling.sample import sample


def choose(logits: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """One token per row, without waiting for the device.

    Args:
        logits: [rows, vocab], float32, float16 or bfloat16.

    Returns:
        int32 [rows]; -1 where a row holds NaN or +inf or nothing but -inf.
    """
    columns = (settings.temperature, settings.min_p, settings.top_k, settings.top_p, settings.uniform)
    return sample(logits, *to_device([np.array(column, np.float64) for column in columns], logits.device))
